"""The kernels of FP4 experts: gates and ups of all pairs of a row and an expert, downs, the sum over the slots.

`triton` says when each is launched, `grouped` how a tile is multiplied.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .._arithmetic import scaled_sum, to_bf16
from .._pdl_triton import wait
from .grouped import (
    add_step,
    diagonal,
    group_of,
    members,
    pair_at,
    product,
    repeat,
    row_of,
    scale_at,
    scales_of,
    shifts_of,
    sorted_group,
    unscaled,
    words,
)


@triton.jit
def _bytes(s_ptr):
    return s_ptr.to(tl.pointer_type(tl.uint8))


@triton.jit
def _routed(ids_ptr, weights_ptr, factors_ptr, slot, SLOTS: tl.constexpr):
    """(expert, weight fp32 times the expert's factor) of the one row's slots; expert -1: none."""
    expert = tl.load(ids_ptr + slot, mask=slot < SLOTS, other=-1)
    weight = tl.load(weights_ptr + slot, mask=expert >= 0, other=0.0).to(tl.float32)
    if factors_ptr is not None:
        weight = weight * tl.load(factors_ptr + expert, mask=expert >= 0, other=0.0)
    return expert, weight


@triton.jit
def _gate_up_tile(
    x_ptr, w_ptr, s_ptr, factors_ptr, order_ptr, hidden_ptr, shifts, limit, expert, at, live, H: tl.constexpr,
    INTER: tl.constexpr, SLOTS: tl.constexpr, X_STRIDE: tl.constexpr, SORTED: tl.constexpr, LIMITED: tl.constexpr,
    R: tl.constexpr, T: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Those of the expert at places `at` int32 [T] of hidden that are live."""
    GROUP: tl.constexpr = group_of(s_ptr.dtype.element_ty)
    C: tl.constexpr = T * SPLIT
    N: tl.constexpr = R // SPLIT // 2
    K: tl.constexpr = H // SPLIT
    # Gate and up rows alternate in eights, so that the thread that holds a gate in its accumulator holds its up.
    row = tl.arange(0, R) % (2 * N)
    stretch = tl.arange(0, R) // (2 * N)
    place = tl.program_id(0) * N + row // 16 * 8 + row % 8
    half = 1 - row // 8 % 2
    w = words(w_ptr) + expert.to(tl.int64) * (INTER * H // 2)
    w += (row_of(place, SORTED) + half * INTER) * (H // 4) + stretch * (K // 4)
    s = _bytes(s_ptr) + expert.to(tl.int64) * (2 * INTER * H // GROUP)
    s = scales_of(s, place + half * INTER, H, GROUP, SORTED) + stretch * (128 * K // GROUP)
    pair = pair_at(order_ptr, at, live, SORTED)
    token = repeat(pair // SLOTS, T, SPLIT).to(tl.int64)
    if SORTED:
        x = x_ptr + token * H
    else:
        x = x_ptr.to(tl.pointer_type(tl.int64)) + token * (X_STRIDE // 4) + tl.arange(0, C) // T * (K // 4)
    PLANE: tl.constexpr = H // 4 if SORTED else 0
    live_columns = repeat(live, T, SPLIT)
    acc = product(w, s, x, live_columns, R, C, K, DEPTH, GROUP, PLANE, STAGES, ASM, shifts)
    acc = diagonal(acc, R, T, SPLIT)

    gate, up = tl.split(tl.permute(tl.reshape(acc, (N // 8, 2, 8, T)), (0, 2, 3, 1)))
    if factors_ptr is not None:
        factors_ptr += expert * 2
    gate = unscaled(tl.reshape(gate, (N, T)), factors_ptr)
    if factors_ptr is not None:
        factors_ptr += 1
    up = unscaled(tl.reshape(up, (N, T)), factors_ptr)
    if LIMITED:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
    hidden = gate / (1 + tl.exp(-gate)) * up

    channel = row_of(tl.program_id(0) * N + tl.arange(0, N), SORTED)
    to = hidden_ptr + at.to(tl.int64)[None, :] * INTER + ((channel % 4) * (INTER // 4) + channel // 4)[:, None]
    tl.store(to, to_bf16(hidden), mask=live[None, :])


@triton.jit(do_not_specialize=["pairs", "ids_stride"])
def gate_up(
    x_ptr, ids_ptr, w_ptr, s_ptr, factors_ptr, offsets_ptr, order_ptr, hidden_ptr, pairs, ids_stride, limit,
    H: tl.constexpr, INTER: tl.constexpr, E: tl.constexpr, BOUND: tl.constexpr, SLOTS: tl.constexpr,
    X_STRIDE: tl.constexpr, PAIRS: tl.constexpr, SORTED: tl.constexpr, LIMITED: tl.constexpr, R: tl.constexpr,
    T: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """hidden bf16 [pairs, 4, I/4] (planes of every fourth channel) = silu(w1 x) * w3 x; w rows: ups, then gates.

    Pairs are in the order of `order`, if SORTED.
    """
    wait()
    if SORTED:
        expert, begin, count = sorted_group(offsets_ptr, E, BOUND, T)
        if expert < 0:
            return
        shifts = shifts_of(offsets_ptr, E, T)
        # What is left of an expert's pairs, in half a tile where that holds it. Both are written out: as an unrolled
        # loop over the two sizes `down` spills.
        if count <= T // 2:
            _gate_up_tile(
                x_ptr, w_ptr, s_ptr, factors_ptr, order_ptr, hidden_ptr, shifts, limit, expert,
                begin + tl.arange(0, T // 2), tl.arange(0, T // 2) < count,
                H, INTER, SLOTS, X_STRIDE, SORTED, LIMITED, R, T // 2, SPLIT, DEPTH, STAGES, ASM,
            )  # fmt: skip
        else:
            _gate_up_tile(
                x_ptr, w_ptr, s_ptr, factors_ptr, order_ptr, hidden_ptr, shifts, limit, expert,
                begin + tl.arange(0, T), tl.arange(0, T) < count,
                H, INTER, SLOTS, X_STRIDE, SORTED, LIMITED, R, T, SPLIT, DEPTH, STAGES, ASM,
            )  # fmt: skip
    else:
        expert, pair, live = members(ids_ptr, ids_stride, pairs, tl.arange(0, T), SLOTS, PAIRS, T)
        if expert < 0:
            return
        _gate_up_tile(
            x_ptr, w_ptr, s_ptr, factors_ptr, order_ptr, hidden_ptr, None, limit, expert, pair, live,
            H, INTER, SLOTS, X_STRIDE, SORTED, LIMITED, R, T, SPLIT, DEPTH, STAGES, ASM,
        )  # fmt: skip


@triton.jit
def _down_tile(
    hidden_ptr, w_ptr, s_ptr, factors_ptr, order_ptr, partial_ptr, shifts, first, partial_stride, expert, at, live,
    H: tl.constexpr, INTER: tl.constexpr, SORTED: tl.constexpr, R: tl.constexpr, T: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Those of the expert at places `at` int32 [T] of hidden that are live."""
    GROUP: tl.constexpr = group_of(s_ptr.dtype.element_ty)
    place = tl.program_id(0) * R + tl.arange(0, R)
    if SORTED:  # others begin at 0
        place += first
    channel = row_of(place, SORTED)
    w = words(w_ptr) + expert.to(tl.int64) * (H * INTER // 4) + channel * (INTER // 4)
    s = scales_of(_bytes(s_ptr) + expert.to(tl.int64) * (H * INTER // GROUP), place, INTER, GROUP, SORTED)
    x = hidden_ptr + at.to(tl.int64) * INTER
    acc = product(w, s, x, live, R, T, INTER, DEPTH, GROUP, INTER // 4, STAGES, ASM, shifts)
    # Read behind the loop, which has no registers to spare.
    pair = pair_at(order_ptr, at, live, SORTED)
    to = partial_ptr + pair.to(tl.int64)[None, :] * partial_stride + (channel - first)[:, None]
    if factors_ptr is not None:
        factors_ptr += expert
    tl.store(to, unscaled(acc, factors_ptr), mask=live[None, :])


@triton.jit(do_not_specialize=["pairs", "ids_stride", "first"])
def down(
    hidden_ptr, ids_ptr, w_ptr, s_ptr, factors_ptr, offsets_ptr, order_ptr, partial_ptr, pairs, ids_stride, first,
    partial_stride, H: tl.constexpr, INTER: tl.constexpr, E: tl.constexpr, BOUND: tl.constexpr, SLOTS: tl.constexpr,
    PAIRS: tl.constexpr, SORTED: tl.constexpr, R: tl.constexpr, T: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """partial fp32 [pairs, partial_stride] = w hidden, output channels from `first` on; w [E, H, I/2]."""
    wait()
    if SORTED:
        expert, begin, count = sorted_group(offsets_ptr, E, BOUND, T)
        if expert < 0:
            return
        shifts = shifts_of(offsets_ptr, E, T)
        # What is left of an expert's pairs, in half a tile where that holds it. Both are written out: as an unrolled
        # loop over the two sizes `down` spills.
        if count <= T // 2:
            _down_tile(
                hidden_ptr, w_ptr, s_ptr, factors_ptr, order_ptr, partial_ptr, shifts, first, partial_stride, expert,
                begin + tl.arange(0, T // 2), tl.arange(0, T // 2) < count,
                H, INTER, SORTED, R, T // 2, DEPTH, STAGES, ASM,
            )  # fmt: skip
        else:
            _down_tile(
                hidden_ptr, w_ptr, s_ptr, factors_ptr, order_ptr, partial_ptr, shifts, first, partial_stride, expert,
                begin + tl.arange(0, T), tl.arange(0, T) < count,
                H, INTER, SORTED, R, T, DEPTH, STAGES, ASM,
            )  # fmt: skip
    else:
        expert, pair, live = members(ids_ptr, ids_stride, pairs, tl.arange(0, T), SLOTS, PAIRS, T)
        if expert < 0:
            return
        _down_tile(
            hidden_ptr, w_ptr, s_ptr, factors_ptr, order_ptr, partial_ptr, None, first, partial_stride, expert, pair,
            live, H, INTER, SORTED, R, T, DEPTH, STAGES, ASM,
        )  # fmt: skip


@triton.jit
def down_row(
    hidden_ptr, ids_ptr, weights_ptr, w_ptr, s_ptr, factors_ptr, y_ptr,
    H: tl.constexpr, INTER: tl.constexpr, SLOTS: tl.constexpr, R: tl.constexpr, T: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """y bf16 [1, H] = sum over slots of weight * (w hidden).

    The slots' channels, one slot after the other, are cut in T stretches, which lie side by side in the tile. A stretch
    is no longer than a slot, so that it has channels of two slots at most, and each step of it of one.
    """
    wait()
    GROUP: tl.constexpr = group_of(s_ptr.dtype.element_ty)
    N: tl.constexpr = R // T
    SLOT: tl.constexpr = INTER // 4
    PART: tl.constexpr = (SLOTS * SLOT + T * DEPTH - 1) // (T * DEPTH) * DEPTH
    place = tl.program_id(0) * N + tl.arange(0, R) % N
    begin = tl.arange(0, R) // N * PART
    slot = begin // SLOT
    expert, weight = _routed(ids_ptr, weights_ptr, factors_ptr, slot, SLOTS)
    next_expert, next_weight = _routed(ids_ptr, weights_ptr, factors_ptr, slot + 1, SLOTS)
    w = words(w_ptr) + row_of(place, False) * SLOT
    s = scales_of(_bytes(s_ptr), place, INTER, GROUP, False)
    column_begin = tl.arange(0, T) * PART
    column_slot = column_begin // SLOT
    column_expert, _ = _routed(ids_ptr, weights_ptr, factors_ptr, column_slot, SLOTS)
    column_next, _ = _routed(ids_ptr, weights_ptr, factors_ptr, column_slot + 1, SLOTS)
    acc = tl.zeros((R, T), tl.float32)
    for start in tl.range(0, PART, DEPTH, num_stages=STAGES):
        later = (begin + start) // SLOT != slot
        here = tl.where(later, next_expert, expert)
        live = (here >= 0)[:, None]
        here = tl.maximum(here, 0).to(tl.int64)
        word = (begin + start) % SLOT
        packed = tl.load((w + here * (H * SLOT) + word)[:, None] + tl.arange(0, DEPTH)[None, :], mask=live, other=0)
        at = (s + here * (H * INTER // GROUP) + word * (512 // GROUP))[:, None] + scale_at(0, DEPTH, GROUP)[None, :]
        scale = tl.load(at, mask=live, other=0)
        column = column_begin + start
        column_live = tl.where(column // SLOT != column_slot, column_next, column_expert) >= 0
        x = hidden_ptr + (column // SLOT * INTER + column % SLOT)[None, :] + tl.arange(0, DEPTH)[:, None]
        step = tl.zeros((R, T), tl.float32)
        step = add_step(step, packed, scale, x, column_live[None, :], R, DEPTH, GROUP, SLOT, ASM)
        acc = scaled_sum(step, tl.where(later, next_weight, weight)[:, None], acc)
    y = unscaled(tl.reshape(diagonal(acc, R, 1, T), (N,)), None)
    tl.store(y_ptr + row_of(tl.program_id(0) * N + tl.arange(0, N), False), to_bf16(y))


@triton.jit(do_not_specialize=["ids_stride", "weights_stride", "first"])
def sum_slots(
    partial_ptr, ids_ptr, weights_ptr, y_ptr, ids_stride, weights_stride, first, partial_stride,
    H: tl.constexpr, SLOTS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y bf16 [rows, H], channels from `first` on = sum over slots of weight * partial fp32 [pairs, stride]."""
    wait()
    row = tl.program_id(0).to(tl.int64)
    local = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (local < partial_stride) & (first + local < H)
    total = tl.zeros((WIDTH,), tl.float32)
    for slot in tl.static_range(SLOTS):
        chosen = tl.load(ids_ptr + row * ids_stride + slot) >= 0
        weight = tl.load(weights_ptr + row * weights_stride + slot, mask=chosen, other=0.0).to(tl.float32)
        at = partial_ptr + (row * SLOTS + slot) * partial_stride + local
        total += weight * tl.load(at, mask=inside & chosen, other=0.0)
    tl.store(y_ptr + row * H + first + local, to_bf16(total), mask=inside)
