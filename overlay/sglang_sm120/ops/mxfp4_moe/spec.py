"""The model's call of `mxfp4_moe`, and what the tools know of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...spec import Arguments, Calls, Inputs, Spec, nbytes
from ...tuned import Shape
from .triton import FAMILIES, Config, Families


def calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    """A layer's experts on one rank."""
    experts, hidden, inter = c["n_routed_experts"], c["hidden_size"], c["moe_intermediate_size"] // tp
    k = c["num_experts_per_tok"]
    yield "experts", {
        "x": make.bf16(rows, hidden),
        "topk_ids": make.distinct(rows, k, experts),
        "topk_weights": make.normal(rows, k).abs(),
        "w13": make.integers(0, 256, experts, 2 * inter, hidden // 2, dtype=torch.uint8),
        "s13": make.e8m0(experts, 2 * inter, hidden // 32, around=-7),
        "w2": make.integers(0, 256, experts, hidden, inter // 2, dtype=torch.uint8),
        "s2": make.e8m0(experts, hidden, inter // 32, around=-7),
        "limit": c["swiglu_limit"],
    }


def traffic(a: Arguments) -> tuple[int, int]:
    """Of the experts that are chosen, and of x; operations of every pair."""
    one = nbytes(*(a[name][0] for name in ("w13", "s13", "g13", "w2", "s2", "g2") if name in a))
    operations = 2 * a["topk_ids"].numel() * 2 * (a["w13"][0].numel() + a["w2"][0].numel())
    return int(a["topk_ids"].unique().numel()) * one + 2 * nbytes(a["x"]), operations


def aim(a: Arguments, rows: int, context: int) -> tuple[str, float] | None:
    """A share of a copy's rate for few rows, of the tensor cores' for many."""
    aims = {1: ("copy_share", 0.45), 4096: ("mma_share", 0.45)}
    return aims.get(rows) or (("copy_share", 0.65) if 8 <= rows <= 64 else None)


def tunables(launches: Families) -> dict[str, Callable[[Shape, int, Any], Iterator[Any]]]:
    """What `make tune` tries of an op's kernels."""
    return {launches.gate_up.name: _gate_up, launches.down.name: _down}


def _gate_up(shape: Shape, rows: int, h: Any) -> Iterator[Any]:
    if rows > 64:
        yield from _sorted_tiles(h)
        return
    tiles: tuple[tuple[int, int], ...] = ((64, 1), (64, 2), (128, 1), (128, 2), (256, 1))
    if rows == 1:
        tiles = ((32, 1), (32, 2), (64, 1), (64, 2), (64, 4), (128, 2), (128, 4), (128, 8))
    for (tile, split), depth in itertools.product(tiles, (64, 128)):
        yield Config(tile, 8 // split, split, depth, 4, 3)
    yield from _around(h)


def _down(shape: Shape, rows: int, h: Any) -> Iterator[Any]:
    if rows > 64:
        yield from _sorted_tiles(h)
        return
    for tile, depth in itertools.product((32, 64, 128) if rows == 1 else (64, 128, 256), (32, 64, 128)):
        yield Config(tile, 8, 1, depth, 4, 3)
    if rows == 1:
        for tile in (32, 64):
            yield Config(tile, 8, 1, 128, 2, 3)
    yield from _around(h)


def _around(h: Any) -> Iterator[Any]:
    yield from (h._replace(stages=stages) for stages in (1, 2, 4, 5))
    yield from (h._replace(warps=warps) for warps in (2, 8))
    yield h._replace(depth=h.depth * 2, stages=2)


def _sorted_tiles(h: Any) -> Iterator[Any]:
    yield from (h._replace(stages=stages) for stages in (2, 4))
    for tile, tokens, depth in itertools.product((64, 128), (16, 32, 64), (32, 64)):
        yield Config(tile, tokens, 1, depth, 4, 3)
    for tokens in (32, 64, 128):
        yield Config(128, tokens, 1, 32, 8, 3)
        yield Config(256, tokens, 1, 32, 8, 3)


SPEC = Spec(
    calls=calls,
    traffic=traffic,
    aim=aim,
    tunables=tunables(FAMILIES),
    served=True,
    by_experts=True,
    synchronises=True,
    prefill="FlashInfer's CUTLASS experts, activations quantised to FP8",
)
