"""What `prove` has found: what it is worth choosing, as a page for people, and two of them side by side."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sglang_sm120 import limits

from . import tuned
from .errors import LaunchError

SCHEMA = 3
"""Version of the JSON file, described in docs/prove.md: raised when a reader of the old one would go wrong."""
GAIN = 1.03
"""What replaces SGLang's own prefill has to be so much faster, or chance might have chosen."""
LONG = 8192
"""Tokens of a prompt from which on a prefill's rate decides: a shorter one is hardly waited for."""
NEARLY = 0.97
"""A chunk of so much of the best one's rate is taken if it is shorter: running requests wait for it."""
Report = Mapping[str, Any]


def line(kind: str, entry: Report, wrong: Sequence[Report]) -> str:
    """An op's or a server's end, for reading while it runs; `kind` is the key of its figures."""
    figures = entry[kind]
    what = f"{entry['verdict']}  {len(figures) - len(wrong)} of {len(figures)} {kind} in {entry['seconds']:.0f} s"
    if entry["verdict"] == "not run":
        what = f"not run: {entry['not_run']}"
    if kind == "points":
        told = [_point(figure) for figure in figures]
    else:
        told = [f"µs beside the default's: {timed}"] if (timed := _beside(figures)) else []
        told += [f"{one['call']}, {one['rows']} rows, context {one['context']}: {_wrong(one)}" for one in wrong[:1]]
    return "; ".join([what, *told, *filter(None, [entry["ended"]])])


def _beside(calls: Sequence[Report]) -> str:
    """Times beside the default's of the calls that have some."""
    return ", ".join(f"{c['rows']} rows {c['us']:.0f} / {c['default_us']:.0f}" for c in calls if c["us"])


def _wrong(call: Report) -> str | None:
    """How a call is wrong, or None."""
    return call["problem"] or call["replay"]


def _name(point: Report) -> str:
    """What a point is of."""
    sizes = [f"{point[name]:,} {word}" for name, word in (("requests", "at once"), ("tokens", "tokens")) if point[name]]
    return ", ".join([point["what"], *sizes])


def _point(point: Report) -> str:
    """A point in words."""
    text = f"{_name(point)}: {point['value']:g}"
    text += f" of {point['of']}" if point["of"] is not None else f" {point['unit']}"
    if point["predicted"] is not None:
        text += f", predicted {point['predicted']:g} ({point['value'] / point['predicted']:.2f})"
    return text + (f", {point['problem']}" if point["problem"] else "")


def _side(server: Report) -> str:
    """Whose prefill a server of `model` has."""
    return server["server"].partition("prefill=")[2] or ("overlay" if "extend" in server["modes"] else "sglang")


def prefills(report: Report) -> dict[str, dict[int, float]]:
    """Tokens a second by whose prefill and by the prompt's length."""
    found: dict[str, dict[int, float]] = {}
    for server in report["servers"]:
        rates = {p["tokens"]: p["value"] for p in server["points"] if p["what"] == "prefill"}
        if rates and server["verdict"] == "pass":
            found[_side(server)] = rates
    return {side: found[side] for side in tuned.PREFILLS if side in found}


def right(report: Report, side: str) -> bool:
    """Whether nothing was found wrong with a prefill: with the step's, every op by default and `recall` had to pass.

    With a provider its ops, and recall with it, besides. SGLang's own is not judged: it may refuse the small model.
    """
    if side == "sglang":
        return True
    needed = {"recall"} if side == "overlay" else {"recall", f"recall, prefill={side}"}
    passed = {one["server"] for one in report["servers"] if one["verdict"] == "pass"}
    ops = [one for one in report["ops"] if one["op"].partition("=")[2] in ("", side)]
    return needed <= passed and all(one["verdict"] == "pass" for one in ops)


def choice(report: Report) -> dict[str, Any] | None:
    """Whose prefill is the fastest of the right ones, and the variables for it; None where there was nothing to choose.

    Another one than SGLang's is chosen when it is faster at each length from LONG on, or when SGLang's failed. Decode
    is not chosen, but a provider with arithmetic of its own takes decode and verification of 65 rows or more too.
    """
    rates = prefills(report)
    able = {side: by for side, by in rates.items() if right(report, side)}
    lengths = sorted(set.intersection(*map(set, able.values()))) if able else []
    lengths = [length for length in lengths if length >= LONG]
    failed = {_side(s) for s in report["servers"] if s["server"].startswith("model") and s["verdict"] == "fail"}
    if not lengths or len(rates) < 2 and "sglang" not in failed:
        return None
    least = {length: GAIN * able["sglang"][length] if "sglang" in able else 0.0 for length in lengths}
    faster = [side for side, by in able.items() if all(by[length] > least[length] for length in lengths)]
    best = max(faster, key=lambda side: able[side][lengths[-1]], default="sglang")
    lowered = "" if report["gpu"]["kernels"] == native(report) else report["gpu"]["kernels"]
    told = {side: {str(length): rate for length, rate in by.items()} for side, by in rates.items()}
    file = limits.tuned_table(report["gpu"]["name"], lowered)
    chosen = {"by": best, "variables": dict(tuned.PREFILLS[best]), "chunk": chunk(able.get(best, {}))}
    return chosen | {"tokens_per_s": told, "table": file}


def chunk(rates: Mapping[int, float]) -> int | None:
    """The shortest chunk that is nearly as fast as the best, by tokens a second of prompts that are one chunk each."""
    known = {size: rates[size] for size in tuned.CHUNKS if size in rates}
    if len(known) < len(tuned.CHUNKS):
        return None
    return next(size for size, rate in known.items() if rate >= NEARLY * max(known.values()))


def native(report: Report) -> str:
    """What kernels of the card itself are compiled for."""
    return "sm" + str(report["gpu"]["compute_capability"]).replace(".", "")


def table(report: Report) -> str:
    """The card's tuned table, as it is installed, with what `choice` has found."""
    found = report["choice"]
    about = {"gpu": report["gpu"]["name"], **tuned.read(found["table"])}
    entries = about.pop("entries", [])
    about["prefill"] = {name: found[name] for name in ("by", "chunk", "tokens_per_s")}
    about["prefill"] |= {"evidence": report["evidence"]}
    lines = [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in about.items()]
    return "\n".join(["{", *lines, '"entries": [', ",\n".join(map(json.dumps, entries)), "]", "}", ""])


def advice(report: Report, path: Path | str) -> str:
    """How the choice is taken."""
    found = report["choice"]
    chosen = " ".join(f"{name}={value}" for name, value in found["variables"].items()) or "no variable"
    pieces = f", in chunks of {found['chunk']:,} tokens" if found["chunk"] else ""
    return (
        f"fastest prefill: {found['by']} ({chosen}){pieces}; nothing was changed: `cp {path} "
        f"overlay/sglang_sm120/tuned/{found['table']}` and `make apply` in the clone have `plan` and `serve` take it."
    )


def log_name(server: str) -> str:
    """The file of a server's log."""
    return f"{re.sub(r'[^a-z0-9]+', '-', server.lower())}.log"


def page(report: Report, logs: Sequence[str] = ()) -> str:
    """The file as a page for people; `logs` are files beside it."""
    gpu, versions = report["gpu"], report["versions"]
    names = Counter(card["name"] for card in report["cards"]) or {gpu["name"]: 1}
    cards = " and ".join(f"{count} × {name}" for name, count in names.items())
    emulated = f"**Emulated**: no SM12x card; kernels compiled for {gpu['kernels']} on {gpu['name']}. Nothing here was "
    emulated += "measured on SM120."
    software = ", ".join(f"{name} {value}" for name, value in versions.items() if value)
    parts = [
        f"# sglang-sm120 prove: {report['verdict']}", "",
        "Measured." if report["evidence"] == "measured" else emulated, "",
        f"{cards}, link {report['link'] or 'none'}; {software}; commit "
        f"{report['commit'] or 'unknown'}; {report['seconds']:.0f} s. Doctor: {report['doctor']['status']}.", "",
        *_ops(report), *_decode(report), *_prefill(report), *_recall(report), *_servers(report, logs),
    ]  # fmt: skip
    return "\n".join(parts)


def _row(*cells: Any) -> str:
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _head(*names: str) -> list[str]:
    return [_row(*names), _row(*["---"] * len(names))]


def _ops(report: Report) -> Iterator[str]:
    yield from ("## Kernels", "", "Parity with the torch reference and replay in a CUDA graph.", "")
    yield from _head("op", "verdict", "calls", "largest RMS error", "µs beside the default's")
    for op in report["ops"]:
        rms = max((call["rms"] for call in op["calls"] if call["rms"] is not None), default=None)
        wrong = list(filter(None, map(_wrong, op["calls"])))
        why = "".join(f": {one}" for one in [op["not_run"], op["ended"], *wrong[:1]] if one)
        error = "" if rms is None else f"{rms:.1e}"
        yield _row(f"`{op['op']}`", op["verdict"] + why, len(op["calls"]), error, _beside(op["calls"]))
    yield ""


def _points(report: Report, what: str) -> list[tuple[str, Report]]:
    return [(s["server"], p) for s in report["servers"] for p in s["points"] if p["what"].startswith(what)]


def _decode(report: Report) -> Iterator[str]:
    points = _points(report, "decode")
    if not points:
        return
    off, formula = report["prediction"]["off"], report["prediction"]["formula"]
    yield from ("## A decode step beside its prediction", "", f"`ms(b) = {formula}`, ± {off:.0%}", "")
    yield from _head("server", "requests", "tokens of context", "ms", "predicted", "ratio", "within")
    for server, p in points:
        told: tuple[str, ...] = ("none", "", "")
        if predicted := p["predicted"]:
            ratio = p["value"] / predicted
            bars = f"{predicted:.2f} ({predicted * (1 - off):.2f} to {predicted * (1 + off):.2f})"
            told = (bars, f"{ratio:.2f}", "yes" if abs(ratio - 1) <= off else "no")
        yield _row(server, p["requests"], f"{p['tokens']:,}", f"{p['value']:.2f}", *told)
    yield ""


def _prefill(report: Report) -> Iterator[str]:
    rates = prefills(report)
    if not rates:
        return
    lengths = sorted({length for by in rates.values() for length in by})
    yield from ("## Prefill, tokens/s", "", *_head("by", *(f"{length:,}" for length in lengths)))
    for side, by in rates.items():
        yield _row(side, *(f"{by[length]:,.0f}" if length in by else "" for length in lengths))
    yield from ("", advice(report, "FILE.table.json") if report["choice"] else "Nothing to choose between.", "")


def _recall(report: Report) -> Iterator[str]:
    points = _points(report, "recall")
    if not points:
        return
    yield from ("## Recall of the small model", "", *_head("server", "what", "in flight", "right", "problem"))
    for server, p in points:
        right = f"{p['value']:g} of {p['of']}"
        yield _row(server, p["what"].partition(": ")[2], p["requests"], right, p["problem"] or "")
    yield from (f"\n{server}: {p['value']:.2f} tokens a verification" for server, p in _points(report, "accepted"))
    yield ""


def _servers(report: Report, logs: Sequence[str]) -> Iterator[str]:
    yield from ("## Servers", "")
    if report["left_out"]:
        yield f"Left out: {report['left_out']}."
    if report["servers"]:
        yield from _head("server", "verdict", "what", "the step's passes", "ready, s", "all, s")
    for s in report["servers"]:
        ready = next((f"{p['value']:.0f}" for p in s["points"] if p["what"] == "ready"), "")
        why = "".join(f": {one}" for one in (s["not_run"], s["ended"]) if one)
        yield _row(s["server"], s["verdict"] + why, s["about"] or "", ", ".join(s["modes"]), ready, s["seconds"])
    if logs:
        yield f"\nLogs of servers that failed, **private**, not to be sent unread: {', '.join(f'`{n}`' for n in logs)}."
    yield ""


Times = dict[tuple[str, ...], tuple[float, str]]


def times(report: Report) -> Times:
    """Every time and rate of a file, and its unit, by what it is of."""
    found: Times = {}
    for op in report["ops"]:
        for c in op["calls"]:
            if c["us"]:
                found[op["op"], f"{c['call']}, {c['rows']:,} rows"] = (c["us"], "µs")
    for server in report["servers"]:
        for p in server["points"]:
            if p["of"] is None:
                found[server["server"], _name(p)] = (p["value"], p["unit"])
    return found


def beside(a: Report, b: Report) -> Iterator[str]:
    """For reading: a line for each figure that both files have, B / A, and how the two differ otherwise."""
    for name, run in (("A", a), ("B", b)):
        yield f"{name}: {run['verdict']}, {run['evidence']}, {run['gpu']['name']}, commit {run['commit'] or 'unknown'}"
        failed = [one.get("op") or one["server"] for one in [*run["ops"], *run["servers"]] if one["verdict"] == "fail"]
        yield from (f"{name} failed: {one}" for one in failed)
    versions = [f"{n} {a['versions'].get(n)} and {b['versions'].get(n)}" for n in a["versions"]
                if a["versions"].get(n) != b["versions"].get(n)]  # fmt: skip
    if versions:
        yield f"versions differ: {', '.join(versions)}"
    about = {s["server"]: s["about"] for s in a["servers"]}
    for server in b["servers"]:
        before = about.get(server["server"], server["about"])
        if before != server["about"] and before and server["about"]:
            yield f"{server['server']} differs: {before} and {server['about']}"
    first, second = times(a), times(b)
    yield "ratios B / A; a rate above 1 and a time below 1 mean that B is faster"
    for key in [key for key in first if key in second]:
        (before, unit), (after, _) = first[key], second[key]
        ratio = f"{after / before:5.2f}x" if before else "-"
        yield f"{': '.join(key):<58} {before:>10.1f} -> {after:>10.1f} {unit:<9} {ratio}"


def check(report: Any, path: Path) -> None:
    """Whether a file is what `prove` writes, as far as `beside` reads it.

    Raises:
        LaunchError: it is not.
    """
    schema = report.get("schema")
    if schema != SCHEMA:
        raise LaunchError(f"{path} is of schema {schema!r} of `prove`, needed {SCHEMA}: run this version's `prove`.")
    try:
        good = bool(list(beside(report, report))) and all(math.isfinite(value) for value, _ in times(report).values())
    except (KeyError, TypeError, AttributeError, ValueError):
        good = False
    if not good:
        raise LaunchError(f"{path} is damaged: run `prove` again.")
