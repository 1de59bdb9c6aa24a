"""`make bench`: each Triton kernel at the real model's shapes beside the best other implementations of this GPU.

One JSON object a line: op, call, tp, rows, context, time_us, bytes (read and written once), flops, copy_share (of this
GPU's measured copy bandwidth), mma_share (of its measured bf16 tensor-core rate, same lowering), baseline (the fastest
other implementation), baseline_us, ratio (baseline_us / time_us), baselines (all of them; one that failed says why),
and where there is a target: target, miss_by (0 when met, 0.05 when 5 % short). A table follows.

Everything is timed under CUDA-graph replay; a baseline that synchronises is timed call by call and says `eager`.
Inputs rotate, so that weights come from memory and not from the L2 cache. Ours and every baseline are compared with the
op's reference first; what fails is reported and not timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import date
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
import triton
import triton.language as tl

import baselines
from calls import checker
from sglang_sm120 import kernels, ops, registry, tuned
from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.compilation import Job, compile_jobs, rehearse_job, variant_key
from sglang_sm120.parity import DEVICE, calls_of, triton_result
from sglang_sm120.spec import Call, nbytes
from sm120_lowering import install, limit_shared_memory

L2_BYTES = 128 << 20
REPEATS = 20
SETS = 16
SLOW_US, EAGER_US = 5_000.0, 100_000.0
"""A baseline that takes longer runs on two sets of inputs; one that takes longer still is timed call by call."""
TABLE_CHARACTERS = 11_500


@triton.jit
def _copy_kernel(source, target, n, BLOCK: tl.constexpr):
    offset = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offset, tl.load(source + offset, mask=offset < n), mask=offset < n)


@triton.jit
def _matmul_kernel(a, b, c, K: tl.constexpr, N: tl.constexpr, M: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for k in range(0, K, BK):
        depth = k + tl.arange(0, BK)
        x = tl.load(a + rows[:, None] * K + depth[None, :])
        w = tl.load(b + columns[None, :] * K + depth[:, None])
        total = tl.dot(x, w, total)
    tl.store(c + rows[:, None] * N + columns[None, :], total.to(tl.bfloat16))


def microseconds(functions: list[Callable[[], Any]]) -> float:
    """Median time of one of `functions`, which are captured one after the other and replayed together."""
    # The overlay's scratch belongs to a stream, and the capture must find it there.
    stream = _stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in functions:
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [function() for function in functions]
    for _ in range(3):
        graph.replay()
    median = _median(graph.replay, REPEATS)
    del kept
    return median / len(functions)


@cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def _median(function: Callable[[], Any], repeats: int) -> float:
    """Median microseconds between events around the calls of `function`."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        start.record()
        function()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    return times[len(times) // 2] * 1000


def copy_bandwidth() -> float:
    """Bytes per second, read plus written, of a copy kernel over memory far larger than the L2."""
    n = 1 << 28
    source = torch.randint(0, 1 << 30, (n,), dtype=torch.int32, device=DEVICE)
    target = torch.empty_like(source)
    us = microseconds([lambda: _copy_kernel[(triton.cdiv(n, 8192),)](source, target, n, BLOCK=8192, num_warps=8)] * 2)
    return 2 * 4 * n / us * 1e6


def mma_rate() -> float:
    """bf16 operations per second of a plain Triton matmul, the best of a few tilings."""
    m = n = k = 8192
    a, b = (torch.randn(m, k, device=DEVICE).bfloat16() for _ in range(2))
    c = torch.empty(m, n, device=DEVICE, dtype=torch.bfloat16)
    best = float("inf")
    for block, bk, warps, stages in ((128, 32, 8, 3), (128, 64, 8, 2), (128, 32, 4, 3), (128, 64, 4, 2)):
        grid = (m // block, n // block)
        options: dict[str, Any] = {"BK": bk, "BLOCK": block, "num_warps": warps, "num_stages": stages}
        run = lambda o=options, g=grid: _matmul_kernel[g](a, b, c, K=k, N=n, M=m, **o)  # noqa: E731
        best = min(best, microseconds([run]))
    return 2 * m * n * k / best * 1e6


def rotation(call: Call, others: Callable[[int], Call]) -> list[dict[str, Any]]:
    """Sets of arguments that together exceed the L2, so that a round finds none of its inputs there."""
    if ops.SPECS[call.op].by_experts:
        # Other experts of the same weights.
        total, ids = call.arguments["w13"].shape[0], call.arguments["topk_ids"]
        return [{**call.arguments, "topk_ids": (ids + 13 * turn) % total} for turn in range(SETS)]
    size = nbytes(*call.arguments.values())
    return [call.arguments] + [others(seed).arguments for seed in range(1, min(SETS, 2 * L2_BYTES // size + 1))]


def miss_by(measured: float, kind: str, aim: float) -> float:
    """How far `measured` is from the aim, as a share of the aim; 0 when it is met."""
    return round(max(0.0, measured / aim - 1 if kind == "time_us" else 1 - measured / aim), 3)


def time_baseline(baseline: baselines.Baseline, call: Call, sets: list[dict[str, Any]]) -> dict[str, Any]:
    """A baseline's time, or why it has none."""
    found: dict[str, Any] = {"name": baseline.name, "what": baseline.note, "lowered": baseline.lowered}
    try:
        if missing := baseline.available():
            return found | {"failed": missing}
        first = baseline.prepare(sets[0])
        if baseline.name != baselines.REFERENCE and (problem := baselines.problem_of(baseline, call, first())):
            return found | {"failed": problem}
        once = _median(first, 1)
        if not baseline.captured or once > EAGER_US:
            return found | {"us": round(once if once > EAGER_US else _median(first, 3), 2), "how": "eager"}
        runs = [first] + [baseline.prepare(a) for a in (sets[1:2] if once > SLOW_US else sets[1:])]
        return found | {"us": round(microseconds(runs), 2), "how": "graph"}
    except Exception as error:
        # A bad address poisons the context: then nothing after it could be believed, and this raises.
        torch.cuda.synchronize()
        message = str(error).strip() or "no message"
        return found | {"failed": f"{type(error).__name__}: {message.splitlines()[0][:200]}"}


def bench(
    op: str, tp: int, rows: int, context: int, machine: dict[str, float], chosen: list[str], out: IO[str]
) -> list[dict[str, Any]]:
    """Write one line per call of `op`, and return them."""
    spec, calls = ops.SPECS[op], list(enumerate(ops.calls(op, model_config(), tp, rows, context)))
    listed = [(position, call.label, False) for position, call in calls]
    if "linear" in spec.tunables and rows > 1:
        # There a linear's norm is a kernel of its own.
        normed = [(position, call.label) for position, call in calls if "norm_weight" in call.arguments]
        listed += [(position, f"{label} alone", True) for position, label in normed]
    found = []
    for position, label, alone in listed:
        nth = partial(nth_call, op, tp, rows, context, position, alone=alone)
        call = nth(0)
        row: dict[str, Any] = {"op": op, "call": label, "tp": tp, "rows": rows, "context": context}
        problem = checker(call)(triton_result(call))
        if problem:
            row["failed"] = problem
        else:
            sets = rotation(call, nth)
            us = microseconds([partial(registry.ops()[op].by, "triton", **arguments) for arguments in sets])
            moved, flops = spec.traffic(call.arguments)
            row |= {"time_us": round(us, 2), "bytes": moved, "flops": flops}
            row["copy_share"] = round(moved / us * 1e6 / machine["copy_bytes_per_s"], 3)
            row["mma_share"] = round(flops / us * 1e6 / machine["bf16_flops_per_s"], 3)
            if tp == 2 and (aim := spec.aim(call.arguments, rows, context)):
                row |= {"target": f"{aim[0]} {'<=' if aim[0] == 'time_us' else '>='} {aim[1]:g}"}
                row["miss_by"] = miss_by(us if aim[0] == "time_us" else row[aim[0]], *aim)
            others = [time_baseline(b, call, sets) for b in baselines.baselines(op, [] if alone else chosen)]
            timed = [other for other in others if "us" in other]
            if timed:
                best = min(timed, key=lambda other: other["us"])
                row |= {"baseline": best["name"], "baseline_us": best["us"], "ratio": round(best["us"] / us, 2)}
            row["baselines"] = others
            del sets
        print(json.dumps(row), file=out, flush=True)
        found.append(row)
        del call
        torch.cuda.empty_cache()
    return found


def prepare(names: list[str], tp: int, steps: list[tuple[int, int]], chosen: list[str], workers: int) -> None:
    """Compile everything the benchmark runs in parallel processes, and reserve the overlay's scratch."""
    jobs: dict[str, Job] = {}
    scratch: dict[str, int] = {}
    sms = kernels.sms(DEVICE)
    for op in names:
        for step in steps:
            job = Job(model_config(), op, tp, (step,), sms, table=tuned.of_device(DEVICE))

            def collect(kernel: Any, args: tuple[Any, ...], options: dict[str, Any], _: str, job: Job = job) -> None:
                key = variant_key(kernel, args, options)
                jobs.setdefault(key, replace(job, only=key))

            for owner, size in rehearse_job(job, collect).items():
                scratch[owner] = max(size, scratch.get(owner, 0))
    for owner, size in scratch.items():
        kernels.reserve(owner, size, DEVICE)
    major, minor = torch.cuda.get_device_capability()
    # DeepGEMM and SGLang's CUDA kernels are built at their first call, seconds each: once here, from disk later.
    building = [b for op in names for b in baselines.baselines(op, chosen) if b.compiles]
    with ProcessPoolExecutor(max(1, workers // 2), multiprocessing.get_context("spawn")) as pool:
        futures = [
            pool.submit(build_baseline, b.op, b.name, tp, rows, context, position)
            for rows, context in steps
            for b in building
            for position, _ in enumerate(ops.calls(b.op, model_config(), tp, rows, context))
        ]
        for _ in compile_jobs(jobs.values(), major * 10 + minor, workers):
            pass
        for future in futures:
            if error := future.exception():
                print(f"bench: a process that builds baselines died: {error!r}", file=sys.stderr)
                break


def build_baseline(op: str, name: str, tp: int, rows: int, context: int, position: int) -> None:
    """Run a baseline once on one call of `op`; whatever stops it is reported when it is timed."""
    (baseline,) = baselines.baselines(op, [name])
    if baseline.available() is not None:
        return
    try:
        baseline.prepare(nth_call(op, tp, rows, context, position, 0).arguments)()
        torch.cuda.synchronize()
    except Exception:
        return


def nth_call(op: str, tp: int, rows: int, context: int, position: int, seed: int, alone: bool = False) -> Call:
    """The `position`th of the model's calls of `op`; alone: without the norm before it."""
    call = next(islice(calls_of(op, tp, rows, context, seed), position, None))
    if not alone:
        return call
    kept = {name: value for name, value in call.arguments.items() if name not in ("norm_weight", "eps")}
    return Call(op, call.label, kept)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows for reading, short enough for the tail of a log."""
    lines = [f"{'op call rows':42s}{'us':>8s} copy  mma  ratio of the best other; target"]
    for row in rows:
        what = f"{row['op']} {row['call']} {row['rows']}"
        if "failed" in row:
            lines.append(f"{what:42s} WRONG: {row['failed']}")
            continue
        line = f"{what:42s}{row['time_us']:8.1f}{row['copy_share']:5.0%}{row['mma_share']:5.0%}"
        if "baseline" in row:
            line += f" {row['ratio']:6.2f} {row['baseline']}"
        if "target" in row:
            line += f" {row['target']} {'met' if row['miss_by'] == 0 else format(-row['miss_by'], '.0%')}"
        lines.append(line)
    failures = {(row["op"], other["name"]): other["failed"] for row in rows for other in row.get("baselines", ())
                if "failed" in other}  # fmt: skip
    lines += [f"not timed: {op} {name}: {why[:110]}" for (op, name), why in failures.items()]
    text = "\n".join(lines)
    if len(text) <= TABLE_CHARACTERS:
        return text
    return text[:TABLE_CHARACTERS].rpartition("\n")[0] + "\n(cut here: the rows have everything)"


def lower(lowering: str) -> None:
    """On a Hopper card: compile this process's and its children's Triton kernels as for SM120."""
    if lowering == "sm120" and torch.cuda.get_device_capability()[0] == 9:
        install()
        children = str(Path(__file__).parent / "lowered_children")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (children, os.environ.get("PYTHONPATH"))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", nargs="+", choices=ops.with_triton(), default=ops.with_triton())
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 4096])
    parser.add_argument("--context", type=int, default=65_536)
    parser.add_argument("--baseline", nargs="*", choices=baselines.names(),
                        default=[name for name in baselines.names() if name not in baselines.SLOW],
                        help="default: all but marlin and tilelang, whose first calls build for minutes")  # fmt: skip
    parser.add_argument("--lowering", choices=("sm120", "native"), default="sm120", help="on a Hopper card")
    parser.add_argument("--shared-memory", choices=("sm120", "native"), default="native",
                        help="an SM's, for Triton kernels on a Hopper card: SM120's 100 KiB, or all it has")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="processes that compile")
    parser.add_argument("--out", type=argparse.FileType("w"), default=sys.stdout, help="file for the rows")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("make bench: this machine has no CUDA device, needed one: run it on a GPU machine.", file=sys.stderr)
        return 1
    lower(args.lowering)
    if args.shared_memory == "sm120":
        if torch.cuda.get_device_capability()[0] != 9:
            name = torch.cuda.get_device_name()
            print(f"make bench: --shared-memory sm120 was asked of {name}, needed a Hopper card: leave it out.",
                  file=sys.stderr)  # fmt: skip
            return 2
        limit_shared_memory()
    torch.backends.cuda.matmul.allow_tf32 = False
    began = time.monotonic()
    prepare(args.op, args.tp, [(rows, args.context) for rows in args.rows], args.baseline, args.workers)
    compiled = time.monotonic()
    machine = {"copy_bytes_per_s": copy_bandwidth(), "bf16_flops_per_s": mma_rate()}
    about: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "date": date.today().isoformat()}
    about |= {"lowering": args.lowering, "shared_memory": args.shared_memory}
    about |= {"torch": torch.__version__, "triton": triton.__version__}
    print(json.dumps(about | {key: round(value) for key, value in machine.items()}), file=args.out, flush=True)
    rows = []
    for op in args.op:
        for count in args.rows:
            rows += bench(op, args.tp, count, args.context, machine, args.baseline, args.out)
    print(table(rows))
    tera = {key: value / 1e12 for key, value in machine.items()}
    print(f"{about['gpu']}: copy {tera['copy_bytes_per_s']:.2f} TB/s, mma.sync {tera['bf16_flops_per_s']:.0f} TFLOPS")
    print(f"compiled in {compiled - began:.0f} s, timed in {time.monotonic() - compiled:.0f} s")
    return 1 if any("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
