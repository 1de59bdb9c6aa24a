"""SGLang's own flags: names, kinds of values and spelling, as the installed SGLang's argument parser knows them."""

from __future__ import annotations

import argparse
import contextlib
import difflib
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
        raise LaunchError(f"SGLang does not take these flags ({message.rstrip('.')}): correct what is named.")


class _AskSglang(Exception):
    """Only SGLang's own parser can read this flag."""


class _Unread(argparse.Action):
    """A flag whose action only SGLang has."""

    def __call__(self, *_: Any, **__: Any) -> NoReturn:
        raise _AskSglang


def _unread(word: str) -> Any:
    raise _AskSglang


def human_readable_int(word: str) -> int:
    """As SGLang's of this name reads a plain number; that one knows 64k and the like too."""
    with contextlib.suppress(ValueError):
        return int(word)
    if word[:1].isdigit():
        raise _AskSglang
    raise ValueError(word)


TYPES = {"str": str, "int": int, "float": float, "human_readable_int": human_readable_int}
ACTIONS: dict[str, Any] = {
    "_StoreAction": "store", "_StoreTrueAction": "store_true", "BooleanOptionalAction": argparse.BooleanOptionalAction,
}  # fmt: skip


def from_table(flags: Iterable[Mapping[str, Any]]) -> argparse.ArgumentParser:
    """The parser that the table describes; a flag of a kind that is not known here raises when it is read."""
    parser = _Parser(prog="sglang.launch_server", add_help=False)
    for flag in flags:
        action = ACTIONS.get(flag["action"], _Unread)
        options = {"action": action}
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


def _reader(known: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """A parser for the flags of `known` that keeps what was given, by canonical names, as SGLang will be given it."""
    reader = _Parser(add_help=False, argument_default=argparse.SUPPRESS)
    for action in known._actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        canonical = next((name for name in names if name[2:] in PREFERRED), names[0])
        if action.nargs == 0:
            for name in names:
                reader.add_argument(name, dest=name if name.startswith("--no-") else canonical, action="store_true")
        else:
            kind: Any = action.type if getattr(action.type, "__name__", "") in TYPES else str
            const = True if action.nargs == "?" else None
            reader.add_argument(*names, dest=canonical, nargs=action.nargs, type=kind, const=const)
    return reader


class Flags:
    """The flags of one SGLang, the table's where none is installed.

    Attributes:
        release: the installed one's version, None where none is.
        planned_for: the version whose flags these are.
    """

    def __init__(self, known: argparse.ArgumentParser, release: str | None, planned_for: str | None = None) -> None:
        self.release, self.planned_for = release, planned_for or release
        self._know(known)

    def _know(self, known: argparse.ArgumentParser) -> None:
        self.known, self._words = known, _reader(known)

    @classmethod
    def installed(cls) -> Flags:
        """The flags of the SGLang beside this launcher: the table's if it is of that release."""
        table = json.loads(TABLE.read_text(encoding="utf-8"))
        release = None
        with contextlib.suppress(metadata.PackageNotFoundError):
            release = metadata.version("sglang")
        known = from_table(table["flags"]) if release in (None, table["sglang"]) else imported()
        return cls(known, release, release or table["sglang"])

    def name(self, written: str, where: str) -> str:
        """The flag's canonical name without dashes.

        Raises:
            LaunchError: there is no such flag; the sentence names the nearest.
        """
        word = "--" + written.removeprefix("--").replace("_", "-")
        known = self._words._option_string_actions
        if word not in known:
            raise LaunchError(
                f"{where} has the flag {word}, which SGLang does not know: leave it out, or give the nearest, "
                f"{nearest(word, known)}."
            )
        return known[word].dest[2:]

    def from_words(self, words: Sequence[str]) -> dict[str, Value]:
        """Flags and values from a command line: `["--context-length", "65536"]`."""
        try:
            found, unknown = self._words.parse_known_args(words)
        except _AskSglang:
            self._know(imported())
            return self.from_words(words)
        for word in unknown:
            if word.startswith("--"):
                self.name(word.partition("=")[0], "the command line")
            raise LaunchError(f"{word!r} stands where a flag of SGLang's was needed: leave it out (a switch has none).")
        return {name[2:]: tuple(one) if isinstance(one, list) else one for name, one in vars(found).items()}

    def from_mapping(self, values: Mapping[str, Any], where: str) -> dict[str, Value]:
        """Flags and values from YAML."""
        found: dict[str, Value] = {}
        for written, value in values.items():
            if isinstance(value, list) and value and all(type(entry) is type(value[0]) for entry in value):
                value = tuple(value) if isinstance(value[0], int | str) else value
            if not isinstance(value, bool | int | float | str | tuple):
                raise LaunchError(f"{where} has {written}={value!r}: give a number, a word or a list of one of them.")
            found[self.name(str(written), where)] = value
        return found

    def check(self, arguments: Sequence[str]) -> None:
        """Parse a whole command line as SGLang would.

        Raises:
            LaunchError: with SGLang's own words about what is wrong.
        """
        try:
            self.known.parse_args(list(arguments))
        except _AskSglang:
            self._know(imported())
            self.check(arguments)


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word most like `word`."""
    return difflib.get_close_matches(word, list(known), n=1, cutoff=0)[0]
