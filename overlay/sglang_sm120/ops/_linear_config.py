"""Which kernel of `_linear_triton` computes a call, and in which tiles: a heuristic, and what a table may say instead.

An SM of SM120 has 100 KiB of shared memory, a Hopper card's 228: of blocks with 64 KiB it keeps one where that
card keeps three. FP8 tiles of more than 16 rows were chosen on such a card with 100 KiB in force
(`bench/bench.py --shared-memory sm120`).
"""

from __future__ import annotations

from typing import NamedTuple

import triton

from .. import tuned
from ..formats import fp8_block

THREAD_BYTES = 128
"""Weight bytes one thread of `_gemv` asks for at once: eight loads of 16 bytes."""
GEMV_K = 16_384
"""Longest row, in bytes, that a program of `_gemv` takes whole."""
SMALL = 1 << 25
"""Bytes that rows times weights may come to for `_gemv` to take several rows."""
FEW_ROWS = 16
STAGING_BYTES = 98_304
"""Shared memory for tiles in flight; the rest of the 101,376 bytes is for the results' way out."""
SM_BYTES = 100 << 10
"""Shared memory that an SM of SM120 has for all its blocks."""
PARTS_BYTES = 256 << 20
"""Scratch that a table may ask for."""


class Config(NamedTuple):
    """How one call is computed. bm, bn, bk: tile of rows, outputs and K; warps_k: warps that share K; split: parts
    of K that different programs take. evict_first: whether weights that are not staged leave the caches first (`_gemv`,
    `_few_rows`)."""

    kernel: str
    bm: int
    bn: int
    bk: int
    warps_k: int
    split: int
    stages: int
    warps: int
    evict_first: bool = False


def _padded(k: int) -> int:
    """K as a program of `_gemv` holds it."""
    return max(fp8_block.BLOCK, triton.next_power_of_2(k))


def config(rows: int, groups: int, n: int, k: int, size: int, sms: int) -> Config:
    """The configuration for `rows` rows, weights [groups, n, k] of `size` bytes each, on `sms` SMs.

    It depends on rows only through a few buckets, each of which is compiled once.
    """
    kp = _padded(k)
    # A small weight with few rows of its own keeps few programs busy: rather read it once per row, from L2.
    small = groups * triton.cdiv(n, 16) * 2 < sms and triton.next_power_of_2(rows) * groups * n * k * size <= SMALL
    if (rows <= 1 or (rows <= FEW_ROWS and small)) and kp * size <= GEMV_K:
        warps = 2 if kp * size <= 2048 else 4
        bn = max(1, 32 * warps * THREAD_BYTES // (kp * size))
        while bn > 1 and groups * triton.cdiv(n, bn) < 2 * sms:
            bn //= 2
        # One row reads each weight once; of several, the next one finds it in L2.
        return Config("gemv", 1, min(bn, fp8_block.BLOCK), kp, 1, 1, 1, warps, evict_first=rows <= 1)
    blocks_k = triton.cdiv(k, fp8_block.BLOCK)
    if rows <= FEW_ROWS:
        bm = 8 if rows <= 8 else 16
        if bm == 16 and size == 1 and blocks_k <= 8 and groups * triton.cdiv(n, 64) * 2 > sms:
            # Warps that share so short a K have two steps each, which hide nothing.
            return Config("many", bm, 64, fp8_block.BLOCK, 1, 1, 4, 4)
        bn = 16 if groups * triton.cdiv(n, 32) < (3 * sms if bm == 8 else sms) else 32
        programs = groups * triton.cdiv(n, bn)
        warps_k = min(4, triton.next_power_of_2(blocks_k))
        if bm == 16 and programs < sms and blocks_k >= 16 and size == 1:
            warps_k = 8
        elif bm == 8 and 8 <= blocks_k < 16:
            warps_k = 2
        steps = triton.cdiv(blocks_k, warps_k)
        # An SM's only tile gains from as many steps ahead as fit, one whose steps are then all in flight from 3.
        deep = 4 if programs < sms else 3 if bm == 8 and bn == 16 and steps <= 4 else 2
        stage = warps_k * fp8_block.BLOCK * (bn * size + bm * 2)
        stages = 1 + min(deep, STAGING_BYTES // stage, steps)
        return Config("few", bm, bn, fp8_block.BLOCK, warps_k, 1, stages, warps_k)
    return _many_rows(rows, groups, n, blocks_k, size, sms)


def _many_rows(rows: int, groups: int, n: int, blocks_k: int, size: int, sms: int) -> Config:
    kernel, bm, bn, bk, warps, stages = "many", 128, 128, 64, 8, 4
    if rows <= 32:
        bm, bn, bk, warps, stages = 32, 64, 128, 4, 3
    elif rows <= 64:
        bm, bn, bk, warps, stages = 64, 64, 128, 4, 3
        # Few steps of K do not pay for the second kernel that a split needs.
        if size == 1 and (blocks_k >= 16 or groups * triton.cdiv(n, 128) * 2 > sms):
            kernel, bn = "tma", 128
    elif size == 1:
        # A scale serves a whole step. 64 rows in 4 warps would be faster where an SM holds two such blocks.
        kernel, bk, stages = "tma", 128, 3
    # Rounded up to a power of two, so that neighbouring row counts share a kernel.
    tiles = triton.next_power_of_2(triton.cdiv(rows, bm)) * triton.cdiv(n, bn) * groups
    split = 1
    alone = 2 * (stages - 1) * (bm * 2 + bn * size) * bk > SM_BYTES
    while blocks_k // (split * 2) >= 4:
        # Adding parts takes a kernel, adding more of them little more.
        programs = sms if alone else sms * 2 if size == 1 and split > 1 else sms * 3 // 2
        if tiles * split * 2 > programs:
            break
        split *= 2
    return Config(kernel, bm, bn, bk, 1, split, stages, warps)


def _tuned_refusal(shape: tuned.Shape, rows: int, c: Config) -> str | None:
    groups, n, k, size = shape
    tiles = (16, 32, 64, 128)
    if c.kernel == "gemv":
        alone = {"bm": (1,), "bk": (_padded(k),), "warps_k": (1,), "split": (1,), "stages": (1,)}
        if why := tuned.beyond(c, **alone, bn=(1, 2, 4, 8, *tiles), warps=(1, 2, 4, 8, 16)):
            return why
        held = c.bn * c.bk * size // (32 * c.warps)
        return f"a thread holds {held} bytes of weights and may hold 512" if held > 512 else None
    shared = (c.stages - 1) * (c.bm * 2 + c.bn * size) * c.bk * c.warps_k
    if c.kernel == "few":
        fixed = {"bk": (fp8_block.BLOCK,), "split": (1,)}
        counts = (1, 2, 4, 8, 16)
        if why := tuned.beyond(c, **fixed, bm=(8, 16), bn=tiles, warps_k=counts, stages=range(1, 7), warps=counts):
            return why
        if rows > c.bm:
            return f"bm is {c.bm} and needs to be at least the rows"
    else:
        ranges = {"bm": (*tiles, 256), "bn": tiles, "bk": (32, 64, 128), "warps_k": (1,), "split": (1, 2, 4, 8, 16)}
        kinds = ("gemv", "few", "many", "tma")
        if why := tuned.beyond(c, kernel=kinds, **ranges, stages=range(1, 7), warps=(1, 2, 4, 8, 16)):
            return why
        if c.kernel == "tma" and k % c.bk:
            return f"K is {k} and needs to be a multiple of bk {c.bk}"
        if c.split > 1 and (parts := 4 * c.split * rows * groups * n) > PARTS_BYTES:
            return f"the {c.split} parts of K take {parts} bytes of scratch and may take {PARTS_BYTES}"
    return f"the tiles in flight take {shared} bytes of shared memory" if shared > tuned.SHARED_LIMIT else None


TUNED = tuned.Family("linear", ("groups", "n", "k", "bytes"), Config, _tuned_refusal)
