"""`make bench`: each Triton kernel at the real model's shapes, timed under CUDA-graph replay; one JSON object a line.

Fields: op, call, tp, rows, context, us, bytes (read and written once), flops, copy_share (of this GPU's measured copy
bandwidth), mma_share (of its measured bf16 tensor-core rate, same lowering).
Inputs rotate, so that weights come from memory and not from the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from itertools import islice
from typing import Any

import torch
import triton
import triton.language as tl
from calls import DEVICE, calls_of, triton_ops

from sglang_sm120 import registry
from sglang_sm120.model_calls import Call, model_calls
from sglang_sm120.ops._cases import model_config

L2_BYTES = 128 << 20
REPEATS = 20
SETS = 16


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
    for function in functions:
        function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [function() for function in functions]
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    for _ in range(3):
        graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    times = sorted(start.elapsed_time(end) for start, end in events)
    del kept
    return times[len(times) // 2] * 1000 / len(functions)


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


def _bytes(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    return sum(map(_bytes, value)) if isinstance(value, tuple | list) else 0


def traffic(call: Call) -> tuple[int, int]:
    """(bytes read and written once, floating-point operations) that the call cannot do without."""
    a = call.arguments
    everything = sum(map(_bytes, a.values()))
    if call.op in ("fp8_linear", "fp8_grouped_linear", "bf16_linear_fp32"):
        rows = next(iter(a.values())).shape[0]
        n = a["w"].numel() // a["w"].shape[-1]
        return everything + rows * n * (4 if call.op == "bf16_linear_fp32" else 2), 2 * rows * a["w"].numel()
    if call.op == "mxfp4_moe":
        experts = int(a["topk_ids"].unique().numel())
        one = sum(_bytes(a[name][0]) for name in ("w13", "s13", "w2", "s2"))
        pairs = a["topk_ids"].numel()
        return experts * one + 2 * _bytes(a["x"]), 2 * pairs * 2 * (a["w13"][0].numel() + a["w2"][0].numel())
    if call.op == "sparse_mla":
        candidates = int(a["window_lengths"].sum()) + (int(a["extra_lengths"].sum()) if "extra_lengths" in a and
                                                       a["extra_lengths"] is not None else 0)  # fmt: skip
        return candidates * 584 + 2 * _bytes(a["q"]), 4 * candidates * a["q"].shape[1] * 512
    if call.op in ("indexer_logits", "indexer_topk"):
        entries = int(a["lengths"].sum())
        return entries // a["q"].shape[0] * 132 + _bytes(a["q"]), 2 * entries * a["q"].shape[1] * 128
    if call.op == "gather_dequant_kv":
        return int(a["lengths"].sum()) * 584 + a["slots"].numel() * 1024, 0
    if call.op == "topk_slots":
        return _bytes(a["logits"]) + a["lengths"].numel() * a["k"] * 4, 0
    if call.op in ("mhc_post", "mhc_post_pre"):
        return everything + _bytes(a["x"]) + _bytes(a["f"]), 0
    return everything + _bytes(a.get("x")) // 4, 0


def _rotation(call: Call, others: Callable[[int], Call]) -> list[dict[str, Any]]:
    """Sets of arguments that together exceed the L2, so that a round finds none of its inputs there."""
    if call.op == "mxfp4_moe":
        # Other experts of the same weights.
        total, ids = call.arguments["w13"].shape[0], call.arguments["topk_ids"]
        return [{**call.arguments, "topk_ids": (ids + 13 * turn) % total} for turn in range(SETS)]
    size = sum(map(_bytes, call.arguments.values()))
    return [call.arguments] + [others(seed).arguments for seed in range(1, min(SETS, 2 * L2_BYTES // size + 1))]


def bench(op: str, tp: int, rows: int, context: int, machine: dict[str, float]) -> None:
    """Print one line per call of `op`."""
    function = registry.ops()[op].providers["triton"].function
    labels = [call.label for call in model_calls(model_config(), tp, rows, context, op=op)]
    for position, label in enumerate(labels):

        def nth(seed: int, position: int = position) -> Call:
            return next(islice(calls_of(op, tp, rows, context, seed), position, None))

        call = nth(0)
        us = microseconds([partial(function, **arguments) for arguments in _rotation(call, nth)])
        nbytes, flops = traffic(call)
        row: dict[str, Any] = {"op": op, "call": label, "tp": tp, "rows": rows, "context": context}
        row |= {"us": round(us, 2), "bytes": nbytes, "flops": flops}
        row["copy_share"] = round(nbytes / us * 1e6 / machine["copy_bytes_per_s"], 3)
        row["mma_share"] = round(flops / us * 1e6 / machine["bf16_flops_per_s"], 3)
        print(json.dumps(row), flush=True)
        del call
        torch.cuda.empty_cache()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ops", nargs="*", default=None)
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64, 4096])
    parser.add_argument("--context", type=int, default=65_536)
    parser.add_argument("--lowering", choices=("sm120", "native"), default="sm120", help="on a Hopper card")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("make bench: this machine has no CUDA device, needed one: run it on a GPU machine.", file=sys.stderr)
        return 1
    if args.lowering == "sm120" and torch.cuda.get_device_capability()[0] == 9:
        from sm120_lowering import install

        install()
    machine = {"copy_bytes_per_s": copy_bandwidth(), "bf16_flops_per_s": mma_rate()}
    about = {"gpu": torch.cuda.get_device_name(), "date": date.today().isoformat(), "lowering": args.lowering}
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    print(json.dumps(about | versions | {key: round(value) for key, value in machine.items()}), flush=True)
    for op in args.ops or triton_ops():
        for rows in args.rows:
            bench(op, args.tp, rows, args.context, machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
