"""`docs/kernel-resources.md`: what every compiled kernel needs, one line per kernel and set of constants.

A few hundred lines, so nothing is summarised: the constants (shapes, tiles, warps) tell every variant of today from
every other. Variants that differed in argument types alone would share a line, with the worst figures of both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import triton
from resources import TARGET, Resources

PATH = Path(__file__).parents[2] / "docs/kernel-resources.md"
RENEW = f"If that is meant, run `make test-sm120 RENEW=1` and commit {PATH.parent.name}/{PATH.name}."

_HEAD = f"""# What each kernel needs of an SM120

Compiled, never run: Triton {triton.__version__} for `{TARGET}`, at every shape of DeepSeek-V4-Flash at TP 1, 2 and 4
and of V4-Pro at TP 8. Registers and bytes spilled are per thread, bytes of shared memory per block (limit 101,376).
`make test-sm120` fails where a figure gets worse, a kernel has no line or a line has no kernel; `make test-sm120
RENEW=1` writes this file.

Against Triton 3.6 (commit de4959e) no kernel takes so much more shared memory that an SM holds fewer blocks. Top-k of
16,384 keys spills, as its 1,024 threads have 64 registers each, and by 8 bytes one of 8,192 keys. Triton 3.8 adds as a
tree, whose leaves are held at once: `_finish`, `_route`, `_choose` and `_merge` take up to 40 registers more,
and `_gemv` sums by fours and steps first. `maxnreg` gives `down` and the bf16 `_many_rows` more, since ptxas 13.3
would rather spill for blocks that their shared memory has no room for, and holds `gate_up` and `down` of few rows to
128, of which an SM has enough for 16 warps; `gate_up` of two stretches of V4-Pro's 7,168 channels would spill there
and may have 170.

| op | kernel | constants | registers | spilled | shared |
|---|---|---|---:|---:|---:|
"""


class Key(NamedTuple):
    """What a line is about; constants as `NAME=value`, warps and stages included, in the kernel's order."""

    op: str
    kernel: str
    constants: str


Table = dict[Key, Resources]


def key(op: str, kernel: str, variant: str) -> Key:
    """The line of a variant as `compilation.Kernel` names it: its constants, without the arguments' types."""
    return Key(op, kernel, " ".join(word for word in variant.split(", ") if "=" in word))


def worst(kernels: Iterable[tuple[Key, Resources]]) -> Table:
    """Of kernels with the same key, the largest of each figure."""
    table: Table = {}
    for name, use in kernels:
        table[name] = Resources(*map(max, use, table.get(name, use)))
    return table


def text(table: Mapping[Key, Resources]) -> str:
    """The page, in an order that keeps neighbouring sizes together."""
    lines = [
        f"| {name.op} | `{name.kernel}` | {name.constants} | {use.registers} | {use.spilled} | {use.shared} |\n"
        for name, use in sorted(table.items(), key=lambda line: _natural(line[0]))
    ]
    return _HEAD + "".join(lines)


def parse(page: str) -> Table:
    """The lines of `text`.

    Raises:
        ValueError: a line has not six columns or a figure is no number.
    """
    table: Table = {}
    for line in page.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or cells[0] == "op" or set(line) <= set("|-:"):
            continue
        if len(cells) != 6 or not all(cell.isdecimal() for cell in cells[3:]):
            raise ValueError(
                f"{PATH.name} has the line {line!r}, which needs six columns, three of them numbers. {RENEW}"
            )
        table[Key(cells[0], cells[1].strip("`"), cells[2])] = Resources(*map(int, cells[3:]))
    return table


def compare(table: Mapping[Key, Resources], found: Mapping[Key, Resources], complete: bool) -> list[str]:
    """What got worse, has no line, or (with `complete`) is no longer compiled: one sentence each."""
    problems = []
    for name, use in found.items():
        if name not in table:
            problems.append(f"{_title(name)} has no line.")
            continue
        worse = [
            f"{field} {old} → {new}" for field, old, new in zip(use._fields, table[name], use, strict=True) if new > old
        ]
        if worse:
            problems.append(f"{_title(name)} got worse: {', '.join(worse)}.")
    if complete:
        problems += [f"{_title(name)} has a line and is no longer compiled." for name in table if name not in found]
    return problems


def _title(name: Key) -> str:
    return f"{name.op} {name.kernel} ({name.constants})"


def _natural(name: Key) -> tuple[str, str, list[tuple[int, str]]]:
    parts = re.findall(r"\d+|\D+", name.constants)
    return name.op, name.kernel, [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]
