"""Routed experts with FP4 weights: a fused gate/up + SwiGLU kernel, a down kernel, and a sum over the slots.

Every kernel is the same loop (`grouped.product`): the packed bytes of a tile of weight rows are dequantised in
registers and multiplied by a tile of tokens with tensor cores, because at one token too that costs fewer
instructions per weight than unpacking to fp32 for an FMA. Few rows: each (row, slot) pair finds by itself who shares
its expert, and one of them does the work for all, so nothing is sorted and a weight byte is read once. Many rows:
one small kernel sorts the pairs by expert. Where rows are too few to fill the GPU, several stretches of K are laid
side by side in the tile (rows x stretches times tokens x stretches), whose diagonal is summed at the end.
Sums over slots run in slot order, through fp32 scratch except at one row.

Whether these are MXFP4 or NVFP4 the kernels know by the dtype of the scales, bytes or E4M3. MXFP4 has no factors: they
are None.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ... import kernels, tuned
from ...formats import e8m0, mxfp4
from ...formats.experts import MULTIPLE
from ...registry import Arguments
from .._arithmetic import scaled_sum, to_bf16
from .._pdl_triton import wait
from . import mxfp4_moe
from .grouped import (
    add_step,
    diagonal,
    group_of,
    members,
    product,
    repeat,
    row_of,
    scale_at,
    scales_of,
    sort_pairs,
    to_planes,
    unscaled,
    words,
)

SORT_ABOVE = 64
"""Rows above which sorting the pairs by expert pays for a launch."""
PARTIAL_BYTES = 96 << 20
"""Scratch for the experts' outputs before they are summed; what needs more is computed in stretches of channels."""


class Config(NamedTuple):
    """Tile of a kernel: rows of weights, tokens, stretches of K side by side, words of K, and its launch."""

    rows: int
    tokens: int
    split: int
    depth: int
    warps: int
    stages: int


def _config(rows: int, pairs: int, experts: int, width: int, inter: int, block: int) -> tuple[Config, Config]:
    """Tiles of the gate/up and the down kernel, whose weights have a scale for `block` channels."""
    pairs_per_expert = pairs / experts
    if rows <= SORT_ABOVE:
        # One row: 32 rows of weights per warp, whose share of x then serves two tiles.
        narrow = pairs * inter > 8192
        split = 2 if rows <= 4 and (rows > 1 or narrow) else 4 if rows == 1 else 1
        while width % (MULTIPLE * split):  # a stretch begins with four scales
            split //= 2
        if rows == 1:
            depth = 128 if narrow else 64
            if _alone(rows, pairs):
                depth = math.gcd(depth, inter // 4)
            if narrow:
                return Config(64, 8 // split, split, 64, 2, 3), Config(128, 8, 1, depth, 4, 3)
            return Config(128, 8 // split, split, 64, 4, 3), Config(64, 8, 1, depth, 4, 3)
        return Config(128, 8 // split, split, 64, 4, 3), Config(128, 8, 1, 64, 4, 3)
    if pairs_per_expert <= 12:
        return Config(128, 16, 1, 64, 4, 3), Config(128, 16, 1, 64, 4, 3)
    if pairs_per_expert <= 40:
        return Config(128, 32, 1, 32, 4, 3), Config(128, 32, 1, 32, 4, 3)
    # Three stages unroll a loop of three steps, which then spills; with twice the scales four warps do.
    stages = 3 if inter > 3 * 4 * 32 else 2
    return Config(128, 64, 1, 32, 4, 3), Config(128, 64, 1, 32, 4 * mxfp4.BLOCK // block, stages)


def _tile_refusal(c: Config, block: int) -> str | None:
    tiles = (16, 32, 64, 128, 256)
    why = tuned.beyond(
        c, rows=tiles, tokens=(1, 2, 4, 8, 16, 32, 64, 128), split=(1, 2, 4, 8), depth=(32, 64, 128, 256),
        warps=(1, 2, 4, 8, 16), stages=range(1, 7),
    )  # fmt: skip
    if why:
        return why
    columns = c.tokens * c.split
    if not 8 <= columns <= 128:
        return f"tokens times split is {columns} and needs 8 to 128"
    # Words and scales of the weights, four planes of the tokens.
    shared = (c.stages - 1) * c.depth * (c.rows * 2 + c.rows * 4 // block + columns * 8)
    return f"the tiles in flight take {shared} bytes of shared memory" if shared > tuned.SHARED_LIMIT else None


def _gate_up_refusal(block: int, shape: tuned.Shape, rows: int, c: Config) -> str | None:
    _, hidden, _, _ = shape
    if c.rows // c.split % 16:
        return f"a stretch has {c.rows // c.split} rows and needs a multiple of 16, gates and ups in eights"
    if c.split > 1 and (rows > SORT_ABOVE or hidden % (MULTIPLE * c.split)):
        return f"split is {c.split} and needs to be 1 for {rows} rows of {hidden} channels"
    return _tile_refusal(c, block)


def _down_refusal(block: int, shape: tuned.Shape, rows: int, c: Config) -> str | None:
    _, hidden, inter, slots = shape
    if c.split > 1:
        return f"split is {c.split} and needs to be 1"
    if hidden % c.rows:
        return f"rows are {c.rows} and need to divide the {hidden} channels"
    if _alone(rows, slots):
        if c.tokens < slots or c.rows < c.tokens:
            return f"tokens are {c.tokens} of {c.rows} rows and need to hold the {slots} slots of the one row"
        if inter // 4 % c.depth:
            return f"depth is {c.depth} and needs to divide the {inter // 4} words of a slot"
    return _tile_refusal(c, block)


class Families(NamedTuple):
    """How the two kernels of an op are launched whose weights have a scale for `block` channels."""

    block: int
    gate_up: tuned.Family[Config]
    down: tuned.Family[Config]


def families(op: str, block: int) -> Families:
    """Those of an op, by its name."""
    shape = ("experts", "hidden", "inter", "slots")
    return Families(
        block,
        tuned.Family(f"{op}.gate_up", shape, Config, partial(_gate_up_refusal, block)),
        tuned.Family(f"{op}.down", shape, Config, partial(_down_refusal, block)),
    )


FAMILIES = families("mxfp4_moe", mxfp4.BLOCK)


def _alone(rows: int, slots: int) -> bool:
    """Whether `_down_row` serves the call."""
    return rows == 1 and slots <= 8


@triton.jit(do_not_specialize=["pairs", "ids_stride"])
def _gate_up(
    x_ptr, ids_ptr, w_ptr, s_ptr, factors_ptr, offsets_ptr, order_ptr, hidden_ptr, pairs, ids_stride, limit,
    H: tl.constexpr, INTER: tl.constexpr, E: tl.constexpr, BOUND: tl.constexpr, SLOTS: tl.constexpr,
    X_STRIDE: tl.constexpr, PAIRS: tl.constexpr, SORTED: tl.constexpr, LIMITED: tl.constexpr, R: tl.constexpr,
    T: tl.constexpr, SPLIT: tl.constexpr, DEPTH: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """hidden bf16 [pairs, 4, I/4] (planes of every fourth channel) = silu(w1 x) * w3 x; w rows: ups, then gates."""
    wait()
    GROUP: tl.constexpr = group_of(s_ptr.dtype.element_ty)
    C: tl.constexpr = T * SPLIT
    N: tl.constexpr = R // SPLIT // 2
    K: tl.constexpr = H // SPLIT
    expert, pair, live = members(
        ids_ptr, ids_stride, offsets_ptr, order_ptr, pairs, tl.arange(0, T), E, BOUND, SLOTS, PAIRS, SORTED, T
    )
    if expert < 0:
        return
    # Gate and up rows alternate in eights, so that the thread that holds a gate in its accumulator holds its up.
    row = tl.arange(0, R) % (2 * N)
    stretch = tl.arange(0, R) // (2 * N)
    place = tl.program_id(0) * N + row // 16 * 8 + row % 8
    half = 1 - row // 8 % 2
    w = words(w_ptr) + expert.to(tl.int64) * (INTER * H // 2)
    w += (row_of(place, SORTED) + half * INTER) * (H // 4) + stretch * (K // 4)
    s = _bytes(s_ptr) + expert.to(tl.int64) * (2 * INTER * H // GROUP)
    s = scales_of(s, place + half * INTER, H, GROUP, SORTED) + stretch * (128 * K // GROUP)
    token = repeat(pair // SLOTS, T, SPLIT).to(tl.int64)
    if SORTED:
        x = x_ptr + token * H
    else:
        x = x_ptr.to(tl.pointer_type(tl.int64)) + token * (X_STRIDE // 4) + tl.arange(0, C) // T * (K // 4)
    PLANE: tl.constexpr = H // 4 if SORTED else 0
    live_columns = repeat(live, T, SPLIT)
    acc = product(w, s, x, live_columns, R, C, K, DEPTH, GROUP, PLANE, STAGES, ASM)
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
    to = hidden_ptr + pair.to(tl.int64)[None, :] * INTER + ((channel % 4) * (INTER // 4) + channel // 4)[:, None]
    tl.store(to, to_bf16(hidden), mask=live[None, :])


@triton.jit(do_not_specialize=["pairs", "ids_stride", "first"])
def _down(
    hidden_ptr, ids_ptr, w_ptr, s_ptr, factors_ptr, offsets_ptr, order_ptr, partial_ptr, pairs, ids_stride, first,
    partial_stride, H: tl.constexpr, INTER: tl.constexpr, E: tl.constexpr, BOUND: tl.constexpr, SLOTS: tl.constexpr,
    PAIRS: tl.constexpr, SORTED: tl.constexpr, R: tl.constexpr, T: tl.constexpr, DEPTH: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """partial fp32 [pairs, partial_stride] = w hidden, output channels from `first` on; w [E, H, I/2]."""
    wait()
    GROUP: tl.constexpr = group_of(s_ptr.dtype.element_ty)
    expert, pair, live = members(
        ids_ptr, ids_stride, offsets_ptr, order_ptr, pairs, tl.arange(0, T), E, BOUND, SLOTS, PAIRS, SORTED, T
    )
    if expert < 0:
        return
    place = tl.program_id(0) * R + tl.arange(0, R)
    if SORTED:  # others begin at 0
        place += first
    channel = row_of(place, SORTED)
    w = words(w_ptr) + expert.to(tl.int64) * (H * INTER // 4) + channel * (INTER // 4)
    s = scales_of(_bytes(s_ptr) + expert.to(tl.int64) * (H * INTER // GROUP), place, INTER, GROUP, SORTED)
    x = hidden_ptr + pair.to(tl.int64) * INTER
    acc = product(w, s, x, live, R, T, INTER, DEPTH, GROUP, INTER // 4, STAGES, ASM)
    to = partial_ptr + pair.to(tl.int64)[None, :] * partial_stride + (channel - first)[:, None]
    if factors_ptr is not None:
        factors_ptr += expert
    tl.store(to, unscaled(acc, factors_ptr), mask=live[None, :])


@triton.jit
def _down_row(
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


@triton.jit(do_not_specialize=["ids_stride", "weights_stride", "first"])
def _sum_slots(
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


def accepts(a: Arguments) -> str | None:
    for name in ("x", "topk_ids", "topk_weights"):
        tensor = getattr(a, name)
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            return f"{name} has stride {tensor.stride(-1)} in its last dimension and needs 1."
    for name in [name for name in ("w13", "s13", "g13", "w2", "s2", "g2") if name in vars(a)]:
        tensor = getattr(a, name)
        if not tensor.is_contiguous():
            return f"{name} has strides {tensor.stride()} and needs to be contiguous."
        if tensor.storage_offset() % 4:
            return f"{name} has offset {tensor.storage_offset()} and needs a multiple of 4."
    if a.x.stride(0) % 4 or a.x.storage_offset() % 4:
        return f"x has row stride {a.x.stride(0)} and offset {a.x.storage_offset()} and needs multiples of 4."
    return None


class Plan(NamedTuple):
    """How a call is computed. sort: pairs of a row and an expert are sorted by expert, x is spread into planes.
    alone: one row, whose sum over the slots needs no scratch. stretch: channels of the output made at a time.
    partial_bytes: of the slots' outputs."""

    gate_up: Config
    down: Config
    sort: bool
    alone: bool
    stretch: int
    partial_bytes: int


def _plan(
    launches: Families, device: torch.device, rows: int, slots: int, experts: int, width: int, inter: int
) -> Plan:
    pairs, sort, alone = rows * slots, rows > SORT_ABOVE, _alone(rows, slots)
    gate_up, down = _config(rows, pairs, experts, width, inter, launches.block)
    gate_up = launches.gate_up.choose(device, (experts, width, inter, slots), rows, gate_up)
    down = launches.down.choose(device, (experts, width, inter, slots), rows, down)
    stretch, partial_bytes = stretch_of(pairs, width, down.rows) if sort else (width, 4 * pairs * width)
    return Plan(gate_up, down, sort, alone, stretch, 0 if alone else partial_bytes)


def stretch_of(pairs: int, width: int, multiple: int) -> tuple[int, int]:
    """Channels of the output that are made at a time, a multiple of `multiple`, and bytes of the slots' outputs."""
    stretch = width
    while 4 * pairs * stretch > PARTIAL_BYTES and stretch % (2 * multiple) == 0:
        stretch //= 2
    # Never less for more rows, so that the largest case plans for all.
    return stretch, max(4 * pairs * stretch, min(PARTIAL_BYTES, 4 * pairs * width))


def sum_slots(a: Arguments, partial: torch.Tensor, y: torch.Tensor, first: int, stretch: int) -> None:
    """y bf16 [rows, H], `stretch` channels from `first` on, of the slots' outputs partial fp32 [pairs, stretch]."""
    rows, width = y.shape
    kernels.launch(
        _sum_slots, (rows, triton.cdiv(min(stretch, width - first), 1024)),
        partial, a.topk_ids, a.topk_weights, y, a.topk_ids.stride(0), a.topk_weights.stride(0), first, stretch,
        H=width, SLOTS=a.topk_ids.shape[1], WIDTH=1024, num_warps=4,
    )  # fmt: skip


@mxfp4_moe.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=accepts)
def mxfp4_moe_triton(a: Arguments) -> torch.Tensor:
    """Contract in `mxfp4_moe`."""
    return experts_of(a, FAMILIES, e8m0.scale_bytes(a.s13), e8m0.scale_bytes(a.s2))


def experts_of(
    a: Arguments, launches: Families, s13: torch.Tensor, s2: torch.Tensor, g13: torch.Tensor | None = None,
    g2: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Gates and ups of all pairs, downs, their sum: bf16 [T, H] of what the two ops' arguments have in common.

    Scales are bytes for MXFP4, with the factors g13 fp32 [E, 2] and g2 fp32 [E] E4M3 for NVFP4.
    """
    x, topk_ids = a.x, a.topk_ids
    rows, width = x.shape
    slots, experts, inter = topk_ids.shape[1], a.w13.shape[0], a.w2.shape[2] * 2
    pairs = rows * slots
    p = _plan(launches, x.device, rows, slots, experts, width, inter)
    y = torch.empty((rows, width), dtype=torch.bfloat16, device=x.device)
    w13, w2 = a.w13.view(torch.uint8), a.w2.view(torch.uint8)
    # The planes are read before the first expert's output is written.
    hidden, work, offsets, order = kernels.scratch(
        "mxfp4_moe",
        x.device,
        ((pairs, inter), torch.bfloat16),
        ((max(p.partial_bytes, 2 * rows * width if p.sort else 0),), torch.uint8),
        ((experts + 1 if p.sort else 0,), torch.int32),
        ((pairs if p.sort else 0,), torch.int32),
    )
    partial, planes = work.view(torch.float32), work.view(torch.bfloat16)
    if p.sort:
        kernels.launch(
            sort_pairs, (experts,), topk_ids, offsets, order, pairs, topk_ids.stride(0),
            E=experts, SLOTS=slots, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        kernels.launch(
            to_planes, (rows, triton.cdiv(width, 4096)), x, planes,
            K=width, X_STRIDE=x.stride(0), BLOCK=1024, num_warps=4,
        )  # fmt: skip

    def groups(config: Config) -> int:
        return min(pairs, pairs // config.tokens + experts) if p.sort else pairs

    common = {"H": width, "INTER": inter, "SLOTS": slots, "ASM": x.device.type != "cpu"}
    grouping = {"E": experts, "BOUND": triton.next_power_of_2(experts)}
    grouping |= {"SORTED": p.sort, "PAIRS": _searched_pairs(rows, slots)}
    gate_up, down = p.gate_up, p.down
    per_program = gate_up.rows // gate_up.split // 2
    # Sixteen warps where that takes no spill: with 8 columns, but not for gates and ups of one stretch, and of two only
    # where their places are shifts.
    most = None
    if gate_up.split > 1:
        most = kernels.registers(gate_up.warps, 16 if gate_up.split > 2 or width & (width - 1) == 0 else 12)
    kernels.launch(
        _gate_up, (triton.cdiv(inter, per_program), groups(gate_up)),
        planes if p.sort else x, topk_ids, w13, s13, g13, offsets, order, hidden, pairs, topk_ids.stride(0),
        0.0 if a.limit is None else float(a.limit),
        X_STRIDE=x.stride(0), LIMITED=a.limit is not None, R=gate_up.rows, T=gate_up.tokens, SPLIT=gate_up.split,
        DEPTH=gate_up.depth, STAGES=gate_up.stages, num_warps=gate_up.warps, maxnreg=most, **common, **grouping,
    )  # fmt: skip
    second = {"R": down.rows, "T": down.tokens, "DEPTH": down.depth, "STAGES": down.stages, "num_warps": down.warps}
    if p.alone:
        kernels.launch(
            _down_row, (triton.cdiv(width, down.rows // down.tokens),),
            hidden, topk_ids, a.topk_weights, w2, s2, g2, y, **common, **second,
        )  # fmt: skip
        return y
    most = kernels.registers(down.warps, 16 if down.tokens <= 8 else 8) if down.tokens <= 16 else None
    for first in range(0, width, p.stretch):
        channels = min(p.stretch, width - first)
        kernels.launch(
            _down, (triton.cdiv(channels, down.rows), groups(down)),
            hidden, topk_ids, w2, s2, g2, offsets, order, partial, pairs, topk_ids.stride(0), first, p.stretch,
            maxnreg=most, **common, **grouping, **second,
        )  # fmt: skip
        sum_slots(a, partial, y, first, p.stretch)
    return y


def _searched_pairs(rows: int, slots: int) -> int:
    """Pairs that a pair looks through for its expert's others; a few sizes, since each is compiled."""
    if rows == 1 or rows > SORT_ABOVE:
        return 0
    return triton.next_power_of_2(next(most for most in (4, 16, SORT_ABOVE) if rows <= most) * slots)
