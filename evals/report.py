"""What a run found: one row a judged thing, the table a person reads, and the JSON file a machine reads."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from client import Client, Misuse
from intervals import wilson

SCHEMA = 1
"""Version of the JSON file."""
SHOWN = 5
"""Wrong answers of a row that are printed; the JSON file has all of them."""


@dataclass(frozen=True)
class Row:
    """A score and its floor.

    Attributes:
        suite, name: what was asked.
        right, total: answers; both 0 when not run.
        floor: smallest share that passes.
        published: the share others report, None without one.
        not_run: why nothing was asked; such a row neither passes nor fails.
        wrong: what was expected and what came, for each wrong answer.
        detail: more about the row, for the JSON file.
    """

    suite: str
    name: str
    right: int = 0
    total: int = 0
    floor: float = 1.0
    published: float | None = None
    not_run: str | None = None
    wrong: list[dict[str, Any]] = field(default_factory=list)
    detail: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """`pass`, `FAIL` or `not run`."""
        if self.not_run is not None:
            return "not run"
        # Counts, so that a floor that is itself a share of `total` is not missed by rounding.
        return "pass" if self.total and self.right >= math.ceil(self.floor * self.total - 1e-9) else "FAIL"

    def to_json(self) -> dict[str, Any]:
        """Every field, with score, interval and verdict."""
        scored = self.not_run is None and self.total
        return {
            **dataclasses.asdict(self),
            "score": self.right / self.total if scored else None,
            "interval_95": list(wilson(self.right, self.total)) if scored else None,
            "verdict": self.verdict,
        }


def same_json(a: Any, b: Any) -> bool:
    """Equality of JSON values: numbers by value (3 and 3.0), true is not 1, objects in any order."""
    if isinstance(a, bool) or isinstance(b, bool):
        return a is b
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same_json(a[key], b[key]) for key in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(same_json, a, b))
    return bool(a == b)


def exit_code(rows: Iterable[Row]) -> int:
    """0 when something was judged and nothing failed, else 1."""
    verdicts = {row.verdict for row in rows}
    return 0 if "pass" in verdicts and "FAIL" not in verdicts else 1


def table(rows: Sequence[Row]) -> str:
    """The rows as text: needles as a grid by depth, the others one a line, wrong answers, the sum last."""
    lines = _scores([row for row in rows if row.suite != "needle"])
    lines += _grid([row for row in rows if row.suite == "needle"])
    for row in rows:
        if row.verdict == "FAIL":
            lines += ["", f"{row.suite}: {row.name} has {row.right} of {row.total}, needed {row.floor:.1%}"]
            lines += [f"  {_short(wrong)}" for wrong in row.wrong[:SHOWN]]
            if len(row.wrong) > SHOWN:
                lines.append(f"  and {len(row.wrong) - SHOWN} more, in the JSON file")
    for reason in dict.fromkeys(row.not_run for row in rows if row.not_run):
        number = sum(row.not_run == reason for row in rows)
        lines += ["", f"not run, {number} row{'s' * (number > 1)}: {reason}"]
    counts = [sum(row.verdict == verdict for row in rows) for verdict in ("pass", "FAIL", "not run")]
    lines += ["", "{} passed, {} failed, {} not run (never counted as passed)".format(*counts)]
    return "\n".join(lines).lstrip("\n")


def _scores(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    cells = [("suite", "what", "score %", "95 % interval", "right", "published %", "floor %", "verdict")]
    for row in rows:
        published = "-" if row.published is None else f"{100 * row.published:.2f}"
        if row.not_run is not None or not row.total:
            score, interval, right = "-", "-", "-"
        else:
            low, high = wilson(row.right, row.total)
            score = f"{100 * row.right / row.total:.2f}"
            interval = f"{100 * low:.2f} to {100 * high:.2f} (± {50 * (high - low):.1f})"
            right = f"{row.right}/{row.total}"
        cells.append((row.suite, row.name, score, interval, right, published, f"{100 * row.floor:.2f}", row.verdict))
    return _aligned(cells)


def _grid(rows: Sequence[Row]) -> list[str]:
    """Needle rows `LENGTH xN at DEPTH %` with a line for each length and concurrency, a column for each depth."""
    if not rows:
        return []
    by_line: dict[str, dict[str, Row]] = {}
    for row in rows:
        line, depth = row.name.split(" at ")
        by_line.setdefault(line, {})[depth] = row
    depths = list(next(iter(by_line.values())))
    cells = [("needle", *(f"at {depth}" for depth in depths), "floor %")]
    for line, by_depth in by_line.items():
        found = [
            "not run" if row.not_run else f"{row.right}/{row.total}" + " FAIL" * (row.verdict == "FAIL")
            for row in by_depth.values()
        ]
        cells.append((line, *found, f"{100 * next(iter(by_depth.values())).floor:.2f}"))
    return ["", *_aligned(cells)]


def _aligned(cells: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def _short(wrong: dict[str, Any]) -> str:
    return "; ".join(f"{key} {' '.join(str(value).split())[:160]}" for key, value in wrong.items())


def facts(client: Client) -> dict[str, Any]:
    """What a score is worth nothing without: server, lock, this machine, and the provider of each op on it.

    Machine and providers are those of the host that runs this; `local` says whether the server is there too.

    Raises:
        Misuse: the overlay or the launcher is not installed, or SGLANG_SM120_PROVIDER names what does not exist.
    """
    try:
        import sglang_sm120.ops  # registers each op and its providers
        from sglang_sm120 import __version__, registry
        from sglang_sm120_launch.machine import Machine
    except ImportError as error:
        raise Misuse(f"The overlay cannot be imported ({error}): run `make apply`.") from None
    try:
        providers = [row._asdict() for row in registry.table()]
    except registry.ProviderError as error:
        raise Misuse(str(error)) from None
    lock = Path(sglang_sm120.__file__).with_name("sglang.lock").read_bytes()
    return {
        "url": client.url,
        "model": client.model,
        "server": {"context": client.context, **client.settings},
        "local": urlsplit(client.url).hostname in ("127.0.0.1", "localhost", "::1", "0.0.0.0"),
        "overlay": __version__,
        "lock": {"sglang": json.loads(lock)["sglang"], "sha256": hashlib.sha256(lock).hexdigest()},
        "machine": {"name": _processor(), **json.loads(Machine.detect().to_json())},
        "environment": {name: os.environ[name] for name in sorted(os.environ) if name.startswith("SGLANG_SM120_")},
        "providers": providers,
    }


def _processor() -> str:
    """The processor's name; cards are listed by the launcher's description of the machine."""
    names = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return names[0] if names else platform.machine()


def write(path: Path, known: dict[str, Any], rows: Iterable[Row], complete: bool) -> None:
    """Write the JSON file; `complete` is false while a run goes on or after it was cut off."""
    result = {
        "schema": SCHEMA,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "complete": complete,
        **known,
        "rows": [row.to_json() for row in rows],
    }
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)
