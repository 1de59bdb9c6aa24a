"""`make tune`: try configurations of the kernels on this machine's GPU and keep the faster ones in a table.

Writes `<GPU>.json` (see `sglang_sm120.tuned`) and prints what was tried: heuristic and best in microseconds, the best
one's share of this GPU's measured copy bandwidth, and the fields that differ. Everything is compiled first, in
parallel; then each candidate's result is compared with the op's reference and timed under CUDA-graph replay, with
inputs that rotate through more than the L2. Calls come most valuable first, and what does not fit into --seconds is
left out; entries of calls that were not reached stay as they are in the file.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton

import bench
from calls import checker
from candidates import MANY_ROWS, OF_THE_MODEL, OPS, ROWS, Case, cases
from sglang_sm120 import compilation, kernels, ops, registry, tuned
from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.compilation import Job, variant_key
from sglang_sm120.parity import DEVICE

FOLDER = Path(__file__).parents[1] / "overlay/sglang_sm120/tuned"
GAIN = 0.97
"""A table's entry pays when its time is at most this share of the heuristic's."""
COMPILE_SHARE = 0.55
"""Of the time given, for compiling."""


@dataclass
class Plan:
    """What the candidates launch: variant keys of each, a job that compiles each key, scratch bytes by owner."""

    needs: dict[tuple[tuned.Key, Any], set[str]] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    scratch: dict[str, int] = field(default_factory=dict)


def plan(wanted: list[Case], sms: int) -> Plan:
    """Rehearse every candidate, for the active Triton target."""
    found = Plan()
    for case in wanted:
        call = list(ops.calls(case.op, model_config(), case.tp, case.rows, case.context))[case.position]
        op = registry.ops()[case.op]
        for key, tried in case.tried.items():
            for config in tried:
                table = {key: config}
                launched: list[tuple[Any, ...]] = []
                rehearsal = kernels.Rehearsal(lambda *launch, to=launched: to.append(launch), sms)
                with kernels.rehearse(rehearsal), tuned.using(table):
                    op.by("triton", **call.arguments)
                found.needs[key, config] = {variant_key(*launch) for launch in launched}
                job = Job(model_config(), case.op, case.tp, ((case.rows, case.context),), sms, table=table)
                for variant in sorted(found.needs[key, config]):
                    found.jobs.setdefault(variant, replace(job, only=variant))
                for owner, size in rehearsal.scratch.items():
                    found.scratch[owner] = max(size, found.scratch.get(owner, 0))
    return found


def attempt(job: Job) -> str | None:
    """Compile a job's kernel; None, or why it cannot be used."""
    try:
        compiled, _ = compilation.compile_job(job)
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
    most = max(kernel.shared for kernel in compiled)
    return f"it uses {most} bytes of shared memory" if most > tuned.SHARED_LIMIT else None


def compile_all(jobs: dict[str, Job], capability: int, workers: int, until: float) -> dict[str, str | None]:
    """What `attempt` says of each variant, in order, as far as time allows."""
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, compilation.use_target, (capability,))
    futures: dict[str, Future[str | None]] = {key: pool.submit(attempt, job) for key, job in jobs.items()}
    wait(futures.values(), max(1.0, until - time.monotonic()))
    pool.shutdown(cancel_futures=True)
    finished = {key: future for key, future in futures.items() if not future.cancelled()}
    return {key: repr(e) if (e := future.exception()) else future.result() for key, future in finished.items()}


@dataclass
class Found:
    """A case's outcome: the table that is best for it, and both times."""

    case: Case
    table: dict[tuned.Key, Any]
    heuristic_us: float
    us: float
    nbytes: int
    tried: int
    wrong: list[str]


def sweep(case: Case, usable: Callable[[tuned.Key, Any], bool], until: float) -> Found:
    """Time the candidates of each key in turn, the others' best so far in force."""
    nth = partial(bench.nth_call, case.op, case.tp, case.rows, case.context, case.position)
    call = nth(0)
    sets = bench.rotation(call, nth)
    op = registry.ops()[case.op]
    problem = checker(call)
    wrong: list[str] = []
    tried = 0

    def timed(table: tuned.Table) -> float:
        with tuned.using(table):
            return bench.microseconds([partial(op.by, "triton", **arguments) for arguments in sets])

    def trial(table: tuned.Table) -> float | None:
        try:
            with tuned.using(table):
                why = problem(op.by("triton", **call.arguments))
            if why is None:
                return timed(table)
        except Exception as error:
            # A bad address poisons the context: then nothing after it could be believed, and this raises.
            torch.cuda.synchronize()
            why = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:200]}"
        wrong.append(f"{case.op} {case.label} {case.rows} rows, {list(table.values())}: {why}")
        return None

    nbytes, _ = ops.SPECS[case.op].traffic(call.arguments)
    best: dict[tuned.Key, Any] = {}
    us = trial(best)
    if us is None:
        return Found(case, best, 0.0, 0.0, nbytes, tried, wrong)
    for key, configs in case.tried.items():
        before = best
        for config in configs[1:]:
            if time.monotonic() > until or not usable(key, config):
                continue
            tried += 1
            table = before | {key: config}
            if (took := trial(table)) is not None and took < us:
                best, us = table, took
    # Both once more, side by side, since the least of many times flatters.
    heuristic_us, us = (timed({}), timed(best)) if best else (us, us)
    if us > heuristic_us * GAIN:
        best, us = {}, heuristic_us
    return Found(case, best, heuristic_us, us, nbytes, tried, wrong)


def report(found: list[Found], copy: float) -> Iterator[str]:
    """A line a case: both times, the best one's share of the copy bandwidth, and the fields that differ."""
    yield f"{'op call rows':40s}{'heur us':>9s}{'best us':>9s} copy tried"
    for f in found:
        what = f"{f.case.op} {f.case.label} {f.case.rows}"
        share = f.nbytes / f.us * 1e6 / copy if f.us else 0.0
        line = f"{what:40s}{f.heuristic_us:9.2f}{f.us:9.2f}{share:5.0%}{f.tried:4d}"
        for key, config in f.table.items():
            before = f.case.tried[key][0]._asdict()
            line += "".join(f" {name}={value}" for name, value in config._asdict().items() if value != before[name])
        yield line


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=OPS, default=OF_THE_MODEL)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--many-rows", action="store_true", help=f"also {' and '.join(map(str, MANY_ROWS))} rows")
    parser.add_argument("--context", type=int, nargs="+", default=[65_536])
    parser.add_argument("--seconds", type=float, default=150.0, help="for all of it")
    parser.add_argument("--lowering", choices=("sm120", "native"), default="sm120", help="on a Hopper card")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the table")
    args = parser.parse_args()
    began = time.monotonic()
    if not torch.cuda.is_available():
        print("make tune: this machine has no CUDA device, needed one: run it on a GPU machine.", file=sys.stderr)
        return 1
    bench.lower(args.lowering)
    torch.backends.cuda.matmul.allow_tf32 = False
    path = args.out / tuned.path_of(DEVICE).name
    if path.exists():
        tuned.load(path)
    sms = kernels.sms(DEVICE)
    rows = (*args.rows, *(MANY_ROWS if args.many_rows else ()))
    wanted = cases(args.op, args.tp, rows, args.context, sms)
    planned = plan(wanted, sms)
    for owner, size in planned.scratch.items():
        kernels.reserve(owner, size, DEVICE)
    major, minor = torch.cuda.get_device_capability()
    until = began + args.seconds * COMPILE_SHARE
    compiled = compile_all(planned.jobs, major * 10 + minor, args.workers, until)
    ready = {variant for variant, refusal in compiled.items() if refusal is None}
    built = time.monotonic()

    def usable(key: tuned.Key, config: Any) -> bool:
        return planned.needs[key, config] <= ready

    copy = bench.copy_bandwidth()
    found = []
    for case in wanted:
        if time.monotonic() > began + args.seconds:
            break
        if all(usable(key, configs[0]) for key, configs in case.tried.items()):
            found.append(sweep(case, usable, began + args.seconds))
            write(path, found[-1:], copy)
            torch.cuda.empty_cache()
    wrong = [line for f in found for line in f.wrong]
    for line in sorted({refusal for refusal in compiled.values() if refusal})[:10]:
        print(f"not compiled: {line}")
    for line in wrong[:20]:
        print(f"WRONG: {line}")
    print("\n".join(report(found, copy))[: bench.TABLE_CHARACTERS])
    print(
        f"{len(found)} of {len(wanted)} calls, {len(ready)} of {len(planned.jobs)} kernels compiled in "
        f"{built - began:.0f} s, timed in {time.monotonic() - built:.0f} s; copy {copy / 1e12:.2f} TB/s; wrote {path}"
    )
    return 1 if wrong else 0


def entry_of(key: tuned.Key, config: Any, **notes: Any) -> dict[str, Any]:
    """What `tuned.parse` reads, with notes that it leaves alone."""
    name, shape, rows = key
    sizes = dict(zip(tuned.FAMILIES[name].shape, shape, strict=True))
    return {"family": name, "shape": sizes, "rows": rows, "config": config._asdict(), **notes}


def save(path: Path, written: list[dict[str, Any]], **about: Any) -> None:
    """Write a table, an entry a line; `about` says where it comes from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [f"{json.dumps(name)}: {json.dumps(value)}," for name, value in about.items()]
    listed = ",\n".join(json.dumps(entry) for entry in sorted(written, key=lambda e: json.dumps(tuned.parse(e)[0])))
    path.write_text("\n".join(["{", *lines, '"entries": [', listed, "]", "}", ""]), encoding="utf-8")


def write(path: Path, found: list[Found], copy: float) -> None:
    """Put the entries of `found` into the file, in place of what it had for the same calls."""
    swept = {key for f in found for key in f.case.tried}
    kept = [entry for entry in tuned.entries(path) if tuned.parse(entry)[0] not in swept] if path.exists() else []
    # What `prove` put there stays.
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    chosen = {"prefill": before["prefill"]} if "prefill" in before else {}
    for f in found:
        notes = {"call": f"{f.case.op} {f.case.label}", "us": round(f.us, 2), "heuristic_us": round(f.heuristic_us, 2)}
        notes |= {"date": date.today().isoformat(), "triton": triton.__version__}
        kept += [entry_of(key, config, **notes) for key, config in f.table.items()]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    save(path, kept, gpu=gpu, copy_bytes_per_s=round(copy), **chosen)


if __name__ == "__main__":
    sys.exit(main())
