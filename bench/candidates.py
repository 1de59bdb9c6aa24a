"""What `make tune` tries: calls of the real model, most valuable first, and configurations of their kernels."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import triton

from sglang_sm120 import kernels, registry, tuned
from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.model_calls import Call, model_calls
from sglang_sm120.ops import _linear_config as linear
from sglang_sm120.ops.indexer_logits import triton as indexer_logits
from sglang_sm120.ops.mxfp4_moe import triton as mxfp4_moe
from sglang_sm120.ops.topk_slots import triton as topk_slots

ROWS = (1, 8, 64, 2, 4, 16, 32)
MANY_ROWS = (256, 4096)
LINEARS = ("fp8_linear", "fp8_grouped_linear", "bf16_linear_fp32")
OPS = (*LINEARS, "mxfp4_moe", "indexer_topk")
LARGE = 16 << 20
"""Bytes of a weight whose share of the copy bandwidth has a target."""


@dataclass(frozen=True)
class Case:
    """One call of the model (the `position`th of its op), and by table key what is tried, the heuristic's first."""

    op: str
    label: str
    position: int
    tp: int
    rows: int
    context: int
    tried: dict[tuned.Key, list[Any]] = field(repr=False)


class _Asked(dict[tuned.Key, Any]):
    """An empty table that remembers what it was asked for, and what the heuristic had."""

    def get(self, key: tuned.Key, default: Any = None) -> Any:
        return self.setdefault(key, default)


def asked(call: Call, sms: int) -> dict[tuned.Key, Any]:
    """The heuristic's choice by each table key that a call looks up, on meta tensors."""
    table = _Asked()
    with kernels.rehearse(kernels.Rehearsal(lambda *_: None, sms)), tuned.using(table):
        registry.ops()[call.op].providers["triton"].function(**call.arguments)
    return dict(table)


def cases(ops: Iterable[str], tp: int, rows: Iterable[int], contexts: Iterable[int], sms: int) -> list[Case]:
    """Every case, most valuable first; calls that share all their keys with one before are left out."""
    found: list[tuple[int, Case]] = []
    seen: set[frozenset[tuned.Key]] = set()
    for op, count, context in itertools.product(ops, rows, contexts):
        for position, call in enumerate(model_calls(model_config(), tp, count, context, op=op)):
            chosen = asked(call, sms)
            if frozenset(chosen) in seen:
                continue
            seen.add(frozenset(chosen))
            tried = {key: candidates(key, heuristic) for key, heuristic in chosen.items()}
            found.append((_turn(call, count), Case(op, call.label, position, tp, count, context, tried)))
    return [case for _, case in sorted(found, key=lambda pair: pair[0])]


def _turn(call: Call, rows: int) -> int:
    """Where a call stands in line."""
    if call.op in LINEARS and rows in (1, 8):
        w = call.arguments["w"]
        return 0 if w.numel() * w.element_size() >= LARGE else 3
    if call.op == "mxfp4_moe" and rows in (1, 8, 64):
        return 1
    if call.op == "indexer_topk" and rows == 1:
        return 2
    return 4 if rows <= 64 else 5


def candidates(key: tuned.Key, heuristic: Any) -> list[Any]:
    """The heuristic's configuration and others that its family accepts, each once."""
    name, shape, rows = key
    refusal = tuned.FAMILIES[name].refusal
    others = (c for c in _OTHERS[name](shape, rows, heuristic) if refusal(shape, rows, c) is None)
    return list(dict.fromkeys((heuristic, *others)))


def _linear(shape: tuned.Shape, rows: int, h: Any) -> Iterator[Any]:
    _, _, k, size = shape
    if rows <= 2 or h.kernel == "gemv":
        padded = max(128, triton.next_power_of_2(k))
        # Weights that are read once leave the caches first, faster alone or not: in a step others' inputs stay there.
        evicts = (True,) if rows == 1 else (False, True)
        for warps, held, evict in itertools.product((4, 8, 2), (64, 128, 256), evicts):
            bn = 32 * warps * held // (padded * size)
            yield linear.Config("gemv", 1, min(bn, 128), padded, 1, 1, 1, warps, evict)
    if rows <= 16:
        bm = 8 if rows <= 8 else 16
        few = linear.Config("few", bm, 16, 128, 4, 1, 3, 4)
        for bn, warps in itertools.product((16, 32), (4, 8)):
            for stages in (2, 3) if rows > 1 else (3,):
                yield few._replace(bn=bn, warps_k=warps, warps=warps, stages=stages)
        if rows > 1:
            others = ((16, 2, 4), (16, 4, 4), (16, 4, 1), (16, 8, 1), (32, 2, 3), (32, 2, 5), (32, 4, 1), (32, 4, 4),
                      (32, 4, 5), (64, 4, 2), (64, 4, 3))  # fmt: skip
            for bn, warps, stages in others:
                yield few._replace(bn=bn, warps_k=warps, warps=warps, stages=stages)
            yield few._replace(warps_k=2, stages=4, warps=4)
            yield few._replace(warps_k=4, warps=8)
            for warps, evict in itertools.product((4, 8), (False, True)):
                yield few._replace(warps_k=warps, warps=warps, stages=1, evict_first=evict)
    if rows > 16:
        for bm, split in itertools.product((64, 128), sorted({1, h.split, h.split * 2})):
            yield linear.Config("tma", bm, 128, 128, 1, split, 3, bm // 16)
    if 8 < rows <= 128:
        many = linear.Config("many", max(16, rows), 64, 128, 1, 1, 3, 4)
        for bn, split in itertools.product((32, 64, 128), (1, 2, 4, 8)):
            yield many._replace(bn=bn, split=split)
        for split in {1, max(1, h.split), max(2, h.split * 2)}:
            yield many._replace(split=split, stages=4)
            yield many._replace(split=split, bk=64, stages=4)
            yield many._replace(split=split, bn=128, warps=8)
            yield many._replace(split=split, bm=max(16, rows // 2))
    if rows > 128:
        for bm, bn, bk, stages, warps in itertools.product((64, 128), (64, 128), (32, 64), (3, 4), (4, 8)):
            yield linear.Config("many", bm, bn, bk, 1, 1, stages, warps)
        for bm, bn, stages in itertools.product((64, 128), (64, 128), (2, 3)):
            yield linear.Config("many", bm, bn, 128, 1, 1, stages, 4 * bm * bn // 8192)


def _gate_up(shape: tuned.Shape, rows: int, h: Any) -> Iterator[Any]:
    if rows > 64:
        yield from _sorted_tiles()
        return
    tiles = ((64, 1), (64, 2), (128, 1), (128, 2), (256, 1))
    if rows == 1:
        tiles = ((32, 1), (32, 2), (64, 1), (64, 2), (64, 4), (128, 2), (128, 4), (128, 8))
    for (tile, split), depth in itertools.product(tiles, (64, 128)):
        yield mxfp4_moe.Config(tile, 8 // split, split, depth, 4, 3)
    yield from _around(h)


def _down(shape: tuned.Shape, rows: int, h: Any) -> Iterator[Any]:
    if rows > 64:
        yield from _sorted_tiles()
        return
    for tile, depth in itertools.product((32, 64, 128) if rows == 1 else (64, 128, 256), (32, 64, 128)):
        yield mxfp4_moe.Config(tile, 8, 1, depth, 4, 3)
    if rows == 1:
        for tile in (32, 64):
            yield mxfp4_moe.Config(tile, 8, 1, 128, 2, 3)
    yield from _around(h)


def _around(h: Any) -> Iterator[Any]:
    yield from (h._replace(stages=stages) for stages in (1, 2, 4, 5))
    yield from (h._replace(warps=warps) for warps in (2, 8))
    yield h._replace(depth=h.depth * 2, stages=2)


def _sorted_tiles() -> Iterator[Any]:
    for tile, tokens, depth in itertools.product((64, 128), (16, 32, 64), (32, 64)):
        yield mxfp4_moe.Config(tile, tokens, 1, depth, 4, 3)
    for tokens in (32, 64, 128):
        yield mxfp4_moe.Config(128, tokens, 1, 32, 8, 3)
        yield mxfp4_moe.Config(256, tokens, 1, 32, 8, 3)


def _logits(shape: tuned.Shape, rows: int, h: Any) -> Iterator[Any]:
    for block, warps in ((32, 2), (32, 4), (64, 2), (64, 4), (128, 4), (128, 8), (256, 8)):
        for programs in (2, 4, 8):
            yield indexer_logits.Config(block, programs, warps)


def _topk(shape: tuned.Shape, rows: int, h: Any) -> Iterator[Any]:
    for tile, usual in topk_slots.WARPS.items():
        for warps in (usual, usual // 2, usual * 2):
            yield topk_slots.Config(tile, warps, h.warps_again)
        for again in (4, 8, 16, 32):
            yield topk_slots.Config(tile, usual, again)


_OTHERS = {
    "linear": _linear,
    "mxfp4_moe.gate_up": _gate_up,
    "mxfp4_moe.down": _down,
    "indexer_logits": _logits,
    "topk_slots": _topk,
}
