"""SGLang's own flags: names, kinds of values and spelling, as the installed SGLang's argument parser knows them."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import io
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from .errors import LaunchError
from .settings import Value

PREFERRED = ("tp-size",)
"""Which of a flag's names a plan uses where that is not the first."""


class _Parser(argparse.ArgumentParser):
    """Reports what it cannot parse as an error of ours, without a usage text of five hundred lines."""

    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"SGLang does not take these flags: {message.rstrip('.')}.")


class Flags:
    """The flags of one SGLang; `known` is None where SGLang is not installed and nothing can be checked."""

    def __init__(self, known: argparse.ArgumentParser | None) -> None:
        self.known = known
        actions = known._actions if known is not None else []
        self._actions = {word: action for action in actions for word in action.option_strings if word.startswith("--")}

    @classmethod
    def installed(cls) -> Flags:
        """The flags of the SGLang beside this launcher; importing it takes some ten seconds."""
        if importlib.util.find_spec("sglang") is None:
            return cls(None)
        # Seconds without a word would look like a hang; stdout is the plan's, JSON perhaps.
        print("sglang-sm120: importing SGLang for its flags, some ten seconds", file=sys.stderr, flush=True)
        parser = _Parser(prog="sglang.launch_server", add_help=False)
        # SGLang's import prints warnings about its own dependencies, which would stand before a plan.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
            from sglang.srt.server_args import ServerArgs

            ServerArgs.add_cli_args(parser)
        return cls(parser)

    def name(self, written: str, where: str) -> str:
        """The flag's canonical name without dashes; a prefix stands for a flag where it fits only one, as for SGLang.

        Raises:
            LaunchError: there is no such flag; the sentence names the nearest.
        """
        word = "--" + written.removeprefix("--").replace("_", "-")
        if self.known is None:
            return word[2:]
        matching = {id(a): a for known, a in self._actions.items() if known.startswith(word)}
        action = self._actions.get(word) or (next(iter(matching.values())) if len(matching) == 1 else None)
        if action is None:
            near = difflib.get_close_matches(word, self._actions, n=1, cutoff=0)
            raise LaunchError(f"{where} has the flag {word}, which SGLang does not know: the nearest is {near[0]}.")
        names = [option[2:] for option in action.option_strings if option.startswith("--")]
        return next((name for name in names if name in PREFERRED), names[0])

    def from_words(self, words: Sequence[str]) -> dict[str, Value]:
        """Flags and values from a command line: `["--context-length", "65536"]`."""
        found: dict[str, Value] = {}
        name: str | None = None
        values: list[str] = []
        for word in [*words, "--"]:
            if word.startswith("--"):
                if name is not None:
                    found[name] = self._value(name, values)
                written, equals, rest = word.partition("=")
                name = self.name(written, "the command line") if word != "--" else None
                values = [rest] if equals else []
            elif name is None:
                raise LaunchError(f"{word!r} stands after `--` where a flag of SGLang's was needed.")
            else:
                values.append(word)
        return found

    def from_mapping(self, values: Mapping[str, Any], where: str) -> dict[str, Value]:
        """Flags and values from YAML."""
        found: dict[str, Value] = {}
        for written, value in values.items():
            if isinstance(value, list) and value and all(type(entry) is type(value[0]) for entry in value):
                value = tuple(value) if isinstance(value[0], int | str) else value
            if not isinstance(value, bool | int | float | str | tuple):
                raise LaunchError(f"{where}: {written} is {value!r}, needed a number, a word or a list of one of them.")
            found[self.name(str(written), where)] = value
        return found

    def check(self, arguments: Sequence[str]) -> None:
        """Parse a whole command line as SGLang would.

        Raises:
            LaunchError: with SGLang's own words about what is wrong.
        """
        if self.known is not None:
            self.known.parse_args(list(arguments))

    def _value(self, name: str, words: list[str]) -> Value:
        action = self._actions.get("--" + name)
        if not words:
            if action is not None and action.nargs != 0:
                raise LaunchError(f"--{name} stands without a value: give it one.")
            return True
        if action is None:
            converted: list[Any] = [_guess(word) for word in words]
        elif action.nargs == 0:
            raise LaunchError(f"--{name} is a switch and has the value {words[0]!r}: leave the value out.")
        else:
            try:
                kind: Any = action.type or str
                converted = [kind(word) for word in words]
            except (ValueError, TypeError, argparse.ArgumentTypeError):
                raise LaunchError(f"--{name} has the value {' '.join(words)!r}, which SGLang cannot read.") from None
        return tuple(converted) if len(converted) > 1 or (action and action.nargs in ("+", "*")) else converted[0]


def _guess(word: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    return word


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0)[0]
