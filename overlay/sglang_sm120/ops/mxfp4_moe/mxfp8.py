"""Routed experts on SM120's block-scaled FP8 tensor cores: MXFP8 activations times MXFP4 weights, for many rows.

`mma.sync.kind::mxf8f6f4.block_scale` multiplies 32 values with one scale, which it applies itself, at twice the rate of
bf16. The provider's arithmetic is `emulated`'s: x, and silu(gate) · up without a rounding to bf16 before, are rounded
to MXFP8 (`formats.mxfp8`); weights and products are exact, sums fp32. The order of the sums, and how many bits the
tensor core keeps of a product that is far smaller than its sum, are the hardware's.

Triton's `dot_scaled` of E4M3 and E2M1 becomes bf16 for SM120, so weights are expanded to E4M3 here, in registers: a
nibble's bits, moved to where E4M3 keeps its sign, its two lowest exponent bits and its highest mantissa bit, are the
weight times 2^-6, 0.5 included (it is subnormal); the weight's scale makes up for it. An mma's thread holds in one
register the channels 4 t to 4 t + 3, and in another those 16 further on: so the low nibbles of 16 bytes and then the
high ones are a block's 32 channels, a thread expands what it has loaded, and nothing goes through shared memory again.
Activations are stored in that order, `place` of a block: channels 0, 2, 4, …, then 1, 3, 5, ….

There is no scale of 0, and the smallest, 2^-127, is not small enough for a weight whose scale counts as 0. So scales of
weights are 2^57 times too large, those of activations 2^57 times too small: with the smallest, products of |x| < 2^20
then vanish in fp32.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ... import kernels
from ...formats import e8m0, mxfp8
from ...registry import Arguments
from .._mxfp8_triton import BLOCK, RUNS_ON, launch_quantise_rows, own, quantise
from .._pdl_triton import INTERPRETED, wait
from . import mxfp4_moe, with_operands
from .grouped import LARGEST_SCALE_BYTE, SHIFTS, pair_at, scales_of, sort_pairs, sorted_group
from .triton import SORT_ABOVE, accepts, mxfp4_moe_triton, stretch_of, sum_slots

SHIFT = tl.constexpr(57)
"""Exponent by which scales of activations are too small: the smallest becomes the byte 1. Weights' have 6 more."""
DEPTH = tl.constexpr(128)
"""Channels of a step: four scales of a row, which lie together."""
LOW = tl.constexpr(
    "{ .reg .b32 a; and.b32 a, $1, 0x0F0F0F0F; mad.lo.u32 a, a, 4, 0x60606060; and.b32 $0, a, 0x9C9C9C9C; }"
)
HIGH = tl.constexpr(
    "{ .reg .b32 a; and.b32 a, $1, 0xF0F0F0F0; shr.u32 a, a, 2; add.u32 a, a, 0x60606060; and.b32 $0, a, 0x9C9C9C9C; }"
)
"""PTX that makes E4M3 weights * 2^-6 of the low or the high nibbles of four bytes.

A nibble moved up by two has its sign in bit 5. Adding 0x60 carries that into bit 7, and what else it sets is cut out.
"""


@triton.jit
def _expand(packed, ASSEMBLY: tl.constexpr, SHIFTED: tl.constexpr):
    if INTERPRETED:
        nibble = (packed >> SHIFTED) & 0x0F
        return ((nibble & 8) << 4) | ((nibble & 7) << 2)
    else:
        return tl.inline_asm_elementwise(ASSEMBLY, "=r,r", [packed], dtype=tl.uint8, is_pure=True, pack=4)


@triton.jit
def expand(packed, R: tl.constexpr):
    """packed uint8 [R, DEPTH / 2] to E4M3 [R, DEPTH], weights * 2^-6, each block in the order of `place`."""
    both = tl.join(_expand(packed, LOW, 0), _expand(packed, HIGH, 4))
    blocks = tl.permute(tl.reshape(both, (R, DEPTH // BLOCK, BLOCK // 2, 2)), (0, 1, 3, 2))
    return tl.reshape(blocks, (R, DEPTH)).to(tl.float8e4nv, bitcast=True)


@triton.jit
def product(x, sx, live, w, s, K: tl.constexpr, T: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr):
    """fp32 [T, R] of tokens x E4M3, sx uint8 [T] times weight rows at w, s uint8 [R] over K channels.

    Tokens that are not live are not read and give 0.
    """
    acc = tl.zeros((T, R), tl.float32)
    sx = sx.to(tl.pointer_type(tl.int32))
    s = s.to(tl.pointer_type(tl.int32))
    channel = tl.arange(0, DEPTH)
    byte = tl.arange(0, DEPTH // 2)
    shift = tl.arange(0, DEPTH // BLOCK) * 8
    for start in tl.range(0, K, DEPTH, num_stages=STAGES):
        tokens = tl.load(x[:, None] + (start + channel)[None, :], mask=live[:, None], other=0.0)
        of_tokens = tl.load(sx + start // DEPTH, mask=live, other=0)[:, None] >> shift[None, :]
        packed = tl.load(w[:, None] + (start // 2 + byte)[None, :])
        exponent = (tl.load(s + start)[:, None] >> shift[None, :]) & 0xFF
        scale = tl.where(exponent > LARGEST_SCALE_BYTE, 0, exponent + (SHIFT + 6)).to(tl.uint8)
        acc = tl.dot_scaled(tokens, of_tokens.to(tl.uint8), "e4m3", tl.trans(expand(packed, R)), scale, "e4m3", acc)
    return acc


@triton.jit
def _gate_up_mxfp8(
    x_ptr, sx_ptr, w_ptr, s_ptr, offsets_ptr, order_ptr, hidden_ptr, sh_ptr, limit,
    H: tl.constexpr, INTER: tl.constexpr, E: tl.constexpr, BOUND: tl.constexpr, SLOTS: tl.constexpr,
    LIMITED: tl.constexpr, T: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """hidden E4M3 [pairs, I] in the order of `place`, sh uint8 [pairs, I/32] = silu(w1 x) * w3 x; w: ups, gates."""
    wait()
    N: tl.constexpr = R // 2
    expert, begin, count = sorted_group(offsets_ptr, E, BOUND, T)
    if expert < 0:
        return
    live = tl.arange(0, T) < count
    pair = pair_at(order_ptr, begin + tl.arange(0, T), live, True)
    # Gates and ups alternate, so that the thread that holds a gate in its accumulator holds its up.
    place = tl.program_id(0) * N + tl.arange(0, R) // 2
    channel = place // BLOCK * BLOCK + place % (BLOCK // 2) * 2 + place % BLOCK // (BLOCK // 2)
    row = channel + (1 - tl.arange(0, R) % 2) * INTER
    w = w_ptr + expert.to(tl.int64) * (INTER * H) + row * (H // 2)
    s = scales_of(s_ptr + expert.to(tl.int64) * (INTER * H // 16), row, H, BLOCK, True)
    token = (pair // SLOTS).to(tl.int64)
    acc = product(x_ptr + token * H, sx_ptr + token * (H // BLOCK), live, w, s, H, T, R, STAGES)
    gate, up = tl.split(tl.reshape(acc, (T, N, 2)))
    if LIMITED:
        gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
        up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    hidden = gate / (1 + tl.exp(-gate)) * up
    values, byte = quantise(tl.reshape(hidden, (T, N // BLOCK, BLOCK)), SHIFT)
    pair = pair.to(tl.int64)[:, None]
    to = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(hidden_ptr + pair * INTER + to[None, :], tl.reshape(values, (T, N)), mask=live[:, None])
    to = tl.program_id(0) * (N // BLOCK) + tl.arange(0, N // BLOCK)
    tl.store(sh_ptr + pair * (INTER // BLOCK) + to[None, :], byte, mask=live[:, None])


@triton.jit(do_not_specialize=["first"])
def _down_mxfp8(
    hidden_ptr, sh_ptr, w_ptr, s_ptr, offsets_ptr, order_ptr, partial_ptr, first, partial_stride,
    H: tl.constexpr, INTER: tl.constexpr, E: tl.constexpr, BOUND: tl.constexpr, SLOTS: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """partial fp32 [pairs, partial_stride] = w hidden, output channels from `first` on; w [E, H, I/2]."""
    wait()
    expert, begin, count = sorted_group(offsets_ptr, E, BOUND, T)
    if expert < 0:
        return
    live = tl.arange(0, T) < count
    pair = pair_at(order_ptr, begin + tl.arange(0, T), live, True)
    local = tl.program_id(0) * R + tl.arange(0, R)
    w = w_ptr + expert.to(tl.int64) * (H * INTER // 2) + (first + local) * (INTER // 2)
    s = scales_of(s_ptr + expert.to(tl.int64) * (H * INTER // 32), first + local, INTER, BLOCK, True)
    pair = pair.to(tl.int64)
    acc = product(hidden_ptr + pair * INTER, sh_ptr + pair * (INTER // BLOCK), live, w, s, INTER, T, R, STAGES)
    tl.store(partial_ptr + pair[:, None] * partial_stride + local[None, :], acc, mask=live[:, None])


class Tile(NamedTuple):
    """Tokens of a tile with 128 weight rows, and its launch."""

    tokens: int
    warps: int
    stages: int


def _tile(pairs_per_expert: float) -> Tile:
    """A warp has 32 weight rows and 64 tokens where there are so many: of its instructions, fewest are not an mma."""
    if pairs_per_expert <= 40:
        return Tile(32, 4, 4)
    return Tile(64, 4, 3) if pairs_per_expert <= 80 else Tile(128, 8, 4)


ROWS = 128
"""Weight rows of a tile; each weight's rows are a multiple."""


def emulated(a: Arguments) -> torch.Tensor:
    """What `mxfp4_moe_mxfp8` computes, but for the order of fp32 sums; bf16 [T, H] as `mxfp4_moe`.

    A row whose x has an infinity or NaN is NaN.
    """
    if a.x.shape[0] <= SORT_ABOVE:
        return mxfp4_moe.reference(**vars(a))
    return with_operands(mxfp8.rounded, a)


@mxfp4_moe.provider("mxfp8", runs_on=RUNS_ON, accepts=accepts, own=own(emulated))
def mxfp4_moe_mxfp8(a: Arguments) -> torch.Tensor:
    """Contract in `mxfp4_moe`, activations rounded to MXFP8; up to SORT_ABOVE rows, which the weights' bytes bound,
    `mxfp4_moe_triton` serves."""
    x, topk_ids = a.x, a.topk_ids
    rows, width = x.shape
    if rows <= SORT_ABOVE:
        return mxfp4_moe_triton(a)
    slots, experts, inter = topk_ids.shape[1], a.w13.shape[0], a.w2.shape[2] * 2
    pairs = rows * slots
    tile = _tile(pairs / experts)
    stretch, partial_bytes = stretch_of(pairs, width, ROWS)
    y = torch.empty((rows, width), dtype=torch.bfloat16, device=x.device)
    # x8 and its scales are read before the first expert's output is written.
    hidden, sh, work, offsets, order = kernels.scratch(
        "mxfp4_moe",
        x.device,
        ((pairs, inter), torch.float8_e4m3fn),
        ((pairs, inter // mxfp8.BLOCK), torch.uint8),
        ((max(partial_bytes, rows * width + rows * width // mxfp8.BLOCK),), torch.uint8),
        ((experts + 1 + SHIFTS,), torch.int32),
        ((pairs,), torch.int32),
    )
    partial, x8, sx = work.view(torch.float32), work.view(torch.float8_e4m3fn), work[rows * width :]
    kernels.launch(
        sort_pairs, (experts,), topk_ids, offsets, order, pairs, topk_ids.stride(0),
        E=experts, SLOTS=slots, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    launch_quantise_rows(x, x8, sx, True, SHIFT.value)
    groups = min(pairs, pairs // tile.tokens + experts)
    common = {"H": width, "INTER": inter, "E": experts, "BOUND": triton.next_power_of_2(experts), "SLOTS": slots}
    common |= {"T": tile.tokens, "R": ROWS, "STAGES": tile.stages, "num_warps": tile.warps}
    kernels.launch(
        _gate_up_mxfp8, (2 * inter // ROWS, groups),
        x8, sx, a.w13.view(torch.uint8), e8m0.scale_bytes(a.s13), offsets, order, hidden, sh,
        0.0 if a.limit is None else float(a.limit), LIMITED=a.limit is not None, **common,
    )  # fmt: skip
    for first in range(0, width, stretch):
        channels = min(stretch, width - first)
        kernels.launch(
            _down_mxfp8, (channels // ROWS, groups),
            hidden, sh, a.w2.view(torch.uint8), e8m0.scale_bytes(a.s2), offsets, order, partial, first, stretch,
            **common,
        )  # fmt: skip
        sum_slots(a, partial, y, first, stretch)
    return y
