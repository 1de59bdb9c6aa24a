"""SGLang's own flags: names, kinds of values and spelling, as the installed SGLang's argument parser knows them."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import importlib.util
import io
import json
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn

from .errors import LaunchError
from .settings import Value

PREFERRED = ("tp-size",)
"""Which of a flag's names a plan uses where that is not the first."""
TABLE = Path(__file__).with_name("sglang-flags.json")
"""The flags of one release of SGLang, whose import takes some ten seconds; `tests/launch/flag_table.py` writes it."""


class _Parser(argparse.ArgumentParser):
    """Reports what it cannot parse as an error of ours, without a usage text of five hundred lines."""

    def error(self, message: str) -> NoReturn:
        raise LaunchError(f"SGLang does not take these flags: {message.rstrip('.')}.")


class _AskSglang(Exception):
    """Only SGLang's own parser can read this flag."""


class _Unread(argparse.Action):
    """A flag whose action only SGLang has."""

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise _AskSglang


def _unread(word: str) -> Any:
    raise _AskSglang


def _readable_int(word: str) -> int:
    """As SGLang reads a plain number; it knows 64k and the like too."""
    with contextlib.suppress(ValueError):
        return int(word)
    if word[:1].isdigit():
        raise _AskSglang
    raise ValueError(word)


TYPES = {"str": str, "int": int, "float": float, "human_readable_int": _readable_int}
ACTIONS: dict[str, Any] = {
    "_StoreAction": "store", "_StoreTrueAction": "store_true", "BooleanOptionalAction": argparse.BooleanOptionalAction,
}  # fmt: skip


def from_table(flags: Iterable[Mapping[str, Any]]) -> argparse.ArgumentParser:
    """The parser that the table describes; a flag of a kind that is not known here raises when it is read."""
    parser = _Parser(prog="sglang.launch_server", add_help=False)
    for flag in flags:
        action = ACTIONS.get(flag["action"], _Unread)
        options = {"action": action, "required": flag["required"]}
        if action in ("store", _Unread):
            options |= {"nargs": flag["nargs"], "choices": flag["choices"]}
            options["type"] = flag["type"] and TYPES.get(flag["type"], _unread)
        # Of a switch that can be turned off argparse makes the second half of the names itself.
        names = [name for name in flag["names"] if action != argparse.BooleanOptionalAction or "--no-" not in name]
        parser.add_argument(*names, **options)
    return parser


def imported() -> argparse.ArgumentParser:
    """SGLang's own parser."""
    # Seconds without a word would look like a hang; stdout is the plan's, JSON perhaps.
    print("sglang-sm120: importing SGLang for its flags, some ten seconds", file=sys.stderr, flush=True)
    parser = _Parser(prog="sglang.launch_server", add_help=False)
    # SGLang's import prints warnings about its own dependencies, which would stand before a plan.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(action="ignore"):
        from sglang.srt.server_args import ServerArgs

        ServerArgs.add_cli_args(parser)
    return parser


class Flags:
    """The flags of one SGLang; `known` is None where SGLang is not installed and nothing can be checked."""

    def __init__(self, known: argparse.ArgumentParser | None) -> None:
        self._know(known)

    def _know(self, known: argparse.ArgumentParser | None) -> None:
        self.known = known
        actions = known._actions if known is not None else []
        self._actions = {word: action for action in actions for word in action.option_strings if word.startswith("--")}

    @classmethod
    def installed(cls) -> Flags:
        """The flags of the SGLang beside this launcher: the table's if it is of that release."""
        if importlib.util.find_spec("sglang") is None:
            return cls(None)
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        with contextlib.suppress(metadata.PackageNotFoundError):
            if metadata.version("sglang") == table["sglang"]:
                return cls(from_table(table["flags"]))
        return cls(imported())

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
        if self.known is None:
            return
        try:
            self.known.parse_args(list(arguments))
        except _AskSglang:
            self._know(imported())
            self.check(arguments)

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
            except _AskSglang:
                self._know(imported())
                return self._value(name, words)
        return tuple(converted) if len(converted) > 1 or (action and action.nargs in ("+", "*")) else converted[0]


def _guess(word: str) -> int | float | str:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(word)
    return word


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0)[0]
