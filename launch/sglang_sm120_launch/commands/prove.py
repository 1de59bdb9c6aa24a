"""`sglang-sm120 prove`: doctor, parity and CUDA-graph replay on the card that is there, as one JSON file to send.

Kernels run in a child process, so that one that ends it loses its own op alone: another process goes on with the next.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sglang_sm120 import __version__

from ..address import HOST, PORT
from ..child import Child
from ..errors import LaunchError
from . import doctor

SCHEMA = 2
"""Version of the JSON file, described in docs/prove.md: raised when a reader of the old one would go wrong."""
CHILD = ("-m", "sglang_sm120.parity")
PRIVATE = re.compile(r"[^\s=]*/(?!dev/shm\b|shm\b)\S+|(?<=\bNCCL_)(\w+)=(?!-?\d+(?:\s|$))\S+")
"""A path (/dev/shm is everyone's), and a value of NCCL's that is no number."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of `prove`."""
    parser.add_argument("--out", type=Path, default=Path("prove.json"), metavar="FILE.json",
                        help="the file to write (schema: docs/prove.md; default: %(default)s)")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Write the file; 0 when every op passed that runs here; 1 when one failed, or, without a file, none could run."""
    out: Path = arguments.out
    if out.exists():
        raise LaunchError(f"{out} is there already: move it away, or name another file with --out.")
    if not os.access(out.absolute().parent, os.W_OK):
        raise LaunchError(f"--out {out} cannot be written: name a file in an existing folder of yours.")
    began, ours = time.monotonic(), {"sglang-sm120": __version__, "sglang": version("sglang")}
    print("doctor, then every op with Triton kernels: some minutes", flush=True)
    machine, findings = doctor.look(HOST, PORT)
    print(doctor.table(findings), flush=True)
    found = kernels()
    if isinstance(found, str):
        print(f"sglang-sm120 prove: {found}", file=sys.stderr)
        return 1
    # Providers with arithmetic of their own, which nothing chooses by itself, decide nothing.
    passed = all(op["verdict"] != "fail" for op in found["ops"] if "=" not in op["op"])
    found["versions"] |= {**ours, "driver": machine.driver}
    report: dict[str, Any] = {"schema": SCHEMA, "verdict": "pass" if passed else "fail"}
    report |= {"seconds": round(time.monotonic() - began, 1)}
    report |= {"cards": [dataclasses.asdict(gpu) for gpu in machine.gpus], "link": machine.link, "p2p": machine.p2p}
    report |= {"doctor": doctor.report([finding._replace(found=public(finding.found)) for finding in findings])} | found
    draft = out.with_name(out.name + ".part")
    draft.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(draft, out)
    print(f"{report['verdict']} in {report['seconds']:.0f} s ({found['evidence']}): {out}")
    return 0 if passed else 1


def public(text: str) -> str:
    """A text without the paths and addresses that stand in it."""
    for folder in (Path.cwd(), sys.prefix, Path.home()):
        text = text.replace(str(folder), "/…") if str(folder) != "/" else text
    return PRIVATE.sub(lambda found: f"{found[1]}=…" if found[1] else "…", text)


def kernels() -> dict[str, Any] | str:
    """`gpu`, `versions`, `evidence` and `ops` as docs/prove.md describes them; or why no kernel could be run."""
    found: dict[str, Any] = {}
    waiting: list[str] = []
    while waiting or not found:
        op: dict[str, Any] | None = None
        end = None
        for said in _child(waiting):
            if "none" in said:
                end = said["none"]
            elif "ops" in said:
                waiting = list(said["ops"])
                found = found or {**said, "ops": []}
            elif "op" in said:
                _end(op)
                op = _begin(found["ops"], waiting)
                op["not_run"] = said["not_run"]
            elif op is not None:
                op["calls"].append({**said, "problem": said["problem"] and public(said["problem"])})
        if not found:
            return end or "the process that runs the kernels said nothing."
        if end is not None:
            op = op or _begin(found["ops"], waiting)
            op["ended"] = public(end)
        _end(op)
    return found


def _begin(ops: list[dict[str, Any]], waiting: list[str]) -> dict[str, Any]:
    """The next op's entry, whose `seconds` is when it began, and the beginning of its line."""
    name = waiting.pop(0)
    print(f"{name:<25}", end="", flush=True)
    began = time.monotonic()
    ops.append({"op": name, "verdict": "", "not_run": None, "ended": None, "seconds": began, "calls": []})
    return ops[-1]


def _end(op: dict[str, Any] | None) -> None:
    """Judge an op, and end its line."""
    if op is None:
        return
    op["seconds"] = round(time.monotonic() - op["seconds"], 1)
    wrong = [call for call in op["calls"] if call["problem"] or call["replay"]]
    op["verdict"] = "fail" if wrong or op["ended"] else "not run" if op["not_run"] else "pass"
    line = f"{op['verdict']}  {len(op['calls']) - len(wrong)} of {len(op['calls'])} calls in {op['seconds']:.0f} s"
    if op["verdict"] == "not run":
        line = f"not run: {op['not_run']}"
    timed = [call for call in op["calls"] if call["us"]]
    if timed:
        line += "; µs beside the default's: "
        line += ", ".join(f"{c['rows']} rows {c['us']:.0f} / {c['default_us']:.0f}" for c in timed)
    for call in wrong[:1]:
        line += f"; {call['call']}, {call['rows']} rows, context {call['context']}: {call['problem'] or call['replay']}"
    print(line + (f"; {op['ended']}" if op["ended"] else ""), flush=True)


def _child(ops: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What a process says that runs these ops, or all; `none`: why it runs none of them, or no more."""
    reading, writing = os.pipe()
    with open(reading, encoding="utf-8", errors="replace") as lines:
        with open(writing, "wb") as output:
            child = Child(ops, {}, output, CHILD)
        last = ""
        try:
            for line in lines:
                if line.startswith('{"'):
                    yield json.loads(line)
                elif line.strip():
                    last = line.strip()
            status = child.wait()
        finally:
            child.stop()
    if status:
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        yield {"none": f"the process ended with {how}: {last or 'it said nothing'}"}
