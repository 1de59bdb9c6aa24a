"""Tables for results/ from recorded runs: `python bench/tables.py FILE…`, each bench.jsonl or decode_step.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def _line(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _head(*names: str) -> list[str]:
    return [_line(*names), _line(*["---"] * len(names))]


def kernels(rows: list[dict[str, Any]]) -> str:
    """One row per call: time, shares, every other implementation's time, the target."""
    lines = _head("op", "call", "rows", "µs", "copy", "mma", "others, µs (× ours)", "target")
    for row in rows:
        if "failed" in row:
            lines.append(_line(f"`{row['op']}`", row["call"], row["rows"], f"wrong: {row['failed']}", *[""] * 4))
            continue
        others = [
            f"{o['name']}{'¹' if o['lowered'] else ''}{'²' if o['how'] == 'eager' else ''} {o['us']:.1f} "
            f"({o['us'] / row['time_us']:.2f})"
            for o in sorted((o for o in row["baselines"] if "us" in o), key=lambda o: o["us"])
        ]
        target = ""
        if "target" in row:
            target = row["target"] + (", met" if row["miss_by"] == 0 else f", missed by {row['miss_by']:.0%}")
        shares = f"{row['copy_share']:.0%}", f"{row['mma_share']:.0%}"
        cells = f"`{row['op']}`", row["call"], row["rows"], f"{row['time_us']:.1f}", *shares
        lines.append(_line(*cells, "; ".join(others), target))
    lines += [
        "",
        "¹ Triton, lowered as for SM120 too. ² Timed call by call: it synchronises, or takes over 100 ms.",
        "",
    ]
    notes = {(o["name"], row["op"]): o["what"] for row in rows for o in row.get("baselines", ())}
    lines += [f"* `{name}` of `{op}`: {what}" for (name, op), what in notes.items() if name != "torch"]
    failures = {
        (o["name"], row["op"]): f"{o['failed']} (first at {row['call']}, {row['rows']} rows)"
        for row in reversed(rows)
        for o in row.get("baselines", ())
        if "failed" in o
    }
    lines += ["", "Not timed:"] if failures else []
    lines += [f"* `{name}` of `{op}`: {why}" for (name, op), why in failures.items()]
    return "\n".join(lines)


def decode_step(result: dict[str, Any]) -> str:
    """Times of steps and cycles, then of each batch where the mean cycle goes, and kernel time by op in its graphs.

    Raises:
        KeyError: it is of another form: of before `--serve`, which says what each server was.
    """
    lines = _head("batch", "context", "weights", "server", "ms")
    lines += [
        _line(row["batch"], row["context"], row["weights"], row["server"], f"{row['ms']:.2f}")
        for row in result["steps"]
    ]
    for told in result["profiles"]:
        lines += ["", f"{told['server']}, batch {told['batch']}, {told['context']} tokens:", ""]
        lines += _head("part", "µs", "kernels", "their µs")
        for part in told["replays"]:
            lines.append(_line(part["graph"], part["us"], part["launches"], part["kernels_us"]))
        lines.append(_line("between", told["between_us"], told["between_launches"], told["between_kernels_us"]))
        lines.append(_line("cycle", told["us"], "", f"idle {told['idle_us']}, host waits {told['host_waits_us']}"))
        for part in told["replays"]:
            lines += ["", f"{part['graph']}:", "", *_head("op", "µs", "share")]
            lines += [
                _line(f"`{op}`", us, f"{us / part['kernels_us']:.1%}")
                for op, us in part["ops"].items()
                if us >= 0.002 * part["kernels_us"]
            ]
    return "\n".join(lines)


def bench(path: Path) -> str:
    """What the rates of a bench run were, and its rows."""
    about, *rows = map(json.loads, path.read_text().splitlines())
    copy, mma = about["copy_bytes_per_s"] / 1e12, about["bf16_flops_per_s"] / 1e12
    how = f"lowering {about['lowering']}, shared memory {about['shared_memory']}"
    rates = f"{about['gpu']}, {about['date']}, {how}: copy {copy:.2f} TB/s, mma {mma:.0f} TFLOPS"
    return f"{rates}\n\n{kernels(rows)}"


def main() -> int:
    if len(sys.argv) < 2:
        print(f"tables: no files given, needed at least one: {__doc__}", file=sys.stderr)
        return 2
    for path in map(Path, sys.argv[1:]):
        print(bench(path) if path.suffix == ".jsonl" else decode_step(json.loads(path.read_text())), end="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
