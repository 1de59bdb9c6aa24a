"""`sglang-sm120 compare A.json B.json`: two runs of `bench`, or of `prove`, figure by figure, as ratios B / A."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import passes, proved
from ..errors import LaunchError
from .bench import SCHEMA

SETTINGS = ("model", "output_tokens", "rounds", "server")
"""Keys of a run that make its figures what they are; where two runs differ in them, the reader is told."""

FEW = 8
"""Answers at a point, fewer of which say little about another run."""
COUNTS = ("prompt_tokens", "concurrency", "requests", "completed")
TIMES = ("ttft_ms", "tpot_ms")


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `compare`."""
    parser.add_argument("a", type=Path, metavar="A.json", help="the run to compare with, of `bench` or `prove`")
    parser.add_argument("b", type=Path, metavar="B.json", help="the run whose figures are divided by A's")


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each figure that both runs have; 0.

    Raises:
        LaunchError: a file is no such run, or the two have nothing in common.
    """
    paths = (arguments.a, arguments.b)
    first, second = map(read, paths)
    if "ops" in first and "ops" in second:
        for path, report in zip(paths, (first, second), strict=True):
            proved.check(report, path)
        if not proved.times(first).keys() & proved.times(second).keys():
            raise LaunchError(f"{arguments.a} and {arguments.b} have no time in common: run `prove` in a clone.")
        print("\n".join(proved.beside(first, second)))
        return 0
    a, b = checked(first, arguments.a), checked(second, arguments.b)
    if not _points(a).keys() & _points(b).keys():
        raise LaunchError(
            f"{arguments.a} and {arguments.b} have no point in common: run `bench` with the same --prompt-tokens and "
            "--concurrency."
        )
    print("\n".join(lines(a, b)))
    return 0


def lines(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[str]:
    """For reading: a line for each point that both runs have, and how the runs differ otherwise."""
    points_a, points_b = _points(a), _points(b)
    for name, run in (("A", a), ("B", b)):
        if not run["complete"]:
            yield f"{name} is incomplete: it was ended before its last point"
        failed, asked = (sum(point[key] for point in run["points"]) for key in ("completed", "requests"))
        if failed < asked:
            yield f"{name} had failures: {asked - failed} of {asked} requests"
        yield from (f"{name}: {line}" for line in passes.lines(run.get("passes")))
    yield from (f"{name} differs: {_difference(a[name], b[name])}" for name in SETTINGS if a[name] != b[name])
    common = points_a.keys() & points_b.keys()
    fewest = min(points[key]["completed"] for points in (points_a, points_b) for key in common)
    if fewest < FEW:
        yield f"some points have {fewest} answers: a ratio there may be chance, --rounds of `bench` makes more"
    yield "ratios B / A; throughput above 1 and times below 1 mean that B is faster"
    yield f"{'prompt':>8} {'conc.':>6} {'output tok/s':>22} {'TTFT median ms':>26} {'TPOT median ms':>26}"
    for key in sorted(common):
        rates, *times = (
            _ratio(one(points_a[key]), one(points_b[key]))
            for one in (
                lambda point: point["output_tokens_per_s"],
                lambda point: point["ttft_ms"]["median"],
                lambda point: point["tpot_ms"]["median"],
            )
        )
        yield f"{key[0]:>8} {key[1]:>6} {rates:>22} {times[0]:>26} {times[1]:>26}"
    for name, points, others in (("A", points_a, points_b), ("B", points_b, points_a)):
        if alone := sorted(points.keys() - others.keys()):
            yield f"only in {name}: {', '.join(f'{p} x {c}' for p, c in alone)}"


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        LaunchError: it cannot be read or holds something else.
    """
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LaunchError(f"{path} cannot be read ({error.strerror}): name a result of `bench` or `prove`.") from None
    except (ValueError, RecursionError) as error:
        raise LaunchError(f"{path} is not JSON ({error}): name a result of `bench` or `prove`.") from None
    if not isinstance(result, dict):
        raise LaunchError(f"{path} holds no JSON object: name a result of `bench` or `prove`.")
    return result


def checked(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """A result of `bench`; raises LaunchError when it is none of this version."""
    if "ops" in result:
        raise LaunchError(f"{path} is of `prove` and the other file is not: name two of one kind.")
    schema = result.get("schema")
    if schema != SCHEMA or not isinstance(result.get("points"), list):
        raise LaunchError(
            f"{path} has the schema {schema!r}, needed {SCHEMA}: name a result of this version's `bench`."
        )
    number = (int, float)
    kinds: dict[str, Any] = {"complete": bool, "model": str, "output_tokens": int, "rounds": int, "server": dict}
    wrong = [key for key, kind in kinds.items() if not isinstance(result.get(key), kind)]
    counted = result.get("passes") or {}
    if not isinstance(counted, dict) or any(type(count) not in number for count in counted.values()):
        wrong.append("passes")
    for i, point in enumerate(result["points"]):
        good = isinstance(point, dict) and all(type(point.get(key)) is int for key in COUNTS)
        if good and point["completed"]:
            times = (point.get(key) for key in TIMES)
            figures = [point.get("output_tokens_per_s")]
            figures += [time.get("median") if isinstance(time, dict) else None for time in times]
            good = all(type(figure) in number and math.isfinite(figure) and figure >= 0 for figure in figures)
        if not good:
            wrong.append(f"point {i + 1}")
    if wrong:
        raise LaunchError(f"{path} is damaged ({', '.join(wrong)}): run `bench` again.")
    return result


def _points(result: Mapping[str, Any]) -> dict[tuple[int, int], Mapping[str, Any]]:
    return {(p["prompt_tokens"], p["concurrency"]): p for p in result["points"] if p["completed"]}


def _ratio(a: float, b: float) -> str:
    return f"{a:.1f} -> {b:.1f}  {b / a:5.2f}x" if a else f"{a:.1f} -> {b:.1f}      -"


def _difference(a: Any, b: Any) -> str:
    if not isinstance(a, dict) or not isinstance(b, dict):
        return f"{a} and {b}"
    names = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    return ", ".join(f"{name} {a.get(name)} and {b.get(name)}" for name in names)
