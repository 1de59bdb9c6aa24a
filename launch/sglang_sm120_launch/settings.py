"""One line of a plan: a flag of SGLang's or an environment variable, its value and why it has it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

SECRET = re.compile(r"api-key$|password$")
"""Flags whose values nobody may read over a shoulder or in a log."""
HIDDEN = "********"

Value = bool | int | float | str | tuple[int, ...] | tuple[str, ...]
Get = Callable[[str], Value | None]
"""The value of a flag by its name, None where it is not set."""


@dataclass(frozen=True)
class Setting:
    """A flag (without its dashes) or a variable. A flag that is False is a switch left off: it is not passed."""

    kind: Literal["flag", "env"]
    name: str
    value: Value
    reason: str

    def arguments(self) -> list[str]:
        """The flag as words of a command line."""
        if self.value is False:
            return []
        if self.value is True:
            return [f"--{self.name}"]
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        return [f"--{self.name}", *map(str, values)]

    def shown(self) -> str:
        """The value as the table shows it."""
        if isinstance(self.value, bool):
            return "on" if self.value else "off"
        return " ".join(map(str, self.value)) if isinstance(self.value, tuple) else str(self.value)


def hidden(entry: Setting) -> Setting:
    """The setting as it may be printed: a key's or a password's value is left out."""
    return replace(entry, value=HIDDEN) if entry.kind == "flag" and SECRET.search(entry.name) else entry


def flag(name: str, value: Value, reason: str) -> Setting:
    """A flag of `sglang.launch_server`."""
    return Setting("flag", name, value, reason)


def env(name: str, value: str, reason: str) -> Setting:
    """An environment variable of the server."""
    return Setting("env", name, value, reason)


def command(module: str, settings: Iterable[Setting]) -> list[str]:
    """The command of a Python module with these flags and variables, keys and passwords hidden."""
    entries = list(settings)
    variables = [f"{entry.name}={entry.value}" for entry in entries if entry.kind == "env"]
    words = [word for entry in entries if entry.kind == "flag" for word in hidden(entry).arguments()]
    return [*(["env", *variables] if variables else []), "python", "-m", module, *words]


def overridden(settings: Iterable[Setting], given: Iterable[Setting]) -> tuple[Setting, ...]:
    """`settings` with the given ones in place of decided ones, those that were not decided at the end."""
    return tuple({(entry.kind, entry.name): entry for entry in (*settings, *given)}.values())
