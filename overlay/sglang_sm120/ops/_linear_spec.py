"""What the specs of the linear ops share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import triton

from ..spec import Arguments, nbytes
from ..tuned import Shape
from ._linear_config import Config


def traffic(a: Arguments) -> tuple[int, int]:
    """Bytes and operations of a linear layer with bf16 results, of its arguments: the first are the rows."""
    rows, w = next(iter(a.values())).shape[0], a["w"]
    return nbytes(*a.values()) + rows * w.numel() // w.shape[-1] * 2, 2 * rows * w.numel()


def others(shape: Shape, rows: int, h: Any) -> Iterator[Any]:
    """Configurations to try, as `Spec.tunables`."""
    _, _, k, size = shape
    if rows <= 2 or h.kernel == "gemv":
        padded = max(128, triton.next_power_of_2(k))
        # Weights that are read once leave the caches first, faster alone or not: in a step others' inputs stay there.
        evicts = (True,) if rows == 1 else (False, True)
        for warps, held, evict in itertools.product((4, 8, 2), (64, 128, 256), evicts):
            bn = 32 * warps * held // (padded * size)
            yield Config("gemv", 1, min(bn, 128), padded, 1, 1, 1, warps, evict)
    if rows <= 16:
        bm = 8 if rows <= 8 else 16
        few = Config("few", bm, 16, 128, 4, 1, 3, 4)
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
            yield Config("tma", bm, 128, 128, 1, split, 3, bm // 16)
    if 8 < rows <= 128:
        many = Config("many", max(16, rows), 64, 128, 1, 1, 3, 4)
        for bn, split in itertools.product((32, 64, 128), (1, 2, 4, 8)):
            yield many._replace(bn=bn, split=split)
        for split in {1, max(1, h.split), max(2, h.split * 2)}:
            yield many._replace(split=split, stages=4)
            yield many._replace(split=split, bk=64, stages=4)
            yield many._replace(split=split, bn=128, warps=8)
            yield many._replace(split=split, bm=max(16, rows // 2))
    if rows > 128:
        for bm, bn, bk, stages, warps in itertools.product((64, 128), (64, 128), (32, 64), (3, 4), (4, 8)):
            yield Config("many", bm, bn, bk, 1, 1, stages, warps)
        for bm, bn, stages in itertools.product((64, 128), (64, 128), (2, 3)):
            yield Config("many", bm, bn, 128, 1, 1, stages, 4 * bm * bn // 8192)
