"""YAML with a reason beside each value: PyYAML, which the project has, writes no comments.

Strings are JSON's, which YAML reads too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Said:
    """A value of one line and why it has it."""

    value: Any
    why: str


@dataclass(frozen=True)
class Words:
    """A command line as a sequence: the words of each flag on a line of their own, and why the flag is there."""

    groups: Iterable[tuple[list[str], str]]


def document(value: dict[str, Any]) -> str:
    """One YAML document."""
    return "\n".join(_lines(value)) + "\n"


def _lines(value: Any) -> list[str]:
    """The lines of a mapping or a sequence that is not empty."""
    found = []
    entries = value.items() if isinstance(value, dict) else ((None, entry) for entry in value)
    for key, entry in entries:
        head = "-" if key is None else f"{key}:"
        if isinstance(entry, Words):
            found += [f"{head} [", *(f"  {_comma(words)}  # {why}" for words, why in entry.groups), "]"]
        elif isinstance(entry, Said):
            found.append(f"{head} {_scalar(entry.value)}  # {entry.why}")
        elif isinstance(entry, dict | list) and entry:
            inner = _lines(entry)
            found += [f"- {inner[0]}", *(f"  {line}" for line in inner[1:])] if key is None else [
                head, *(f"  {line}" for line in inner)
            ]  # fmt: skip
        else:
            found.append(f"{head} {_scalar(entry)}")
    return found


def _comma(words: list[str]) -> str:
    return " ".join(f"{_scalar(word)}," for word in words)


def _scalar(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
