"""What the kernels of FP4 experts share: dequantising, the product of weight rows and tokens, who shares an expert.

A 16-bit word holds the weights of four neighbouring channels. Instead of interleaving them, four dots are made, one per
nibble, with every fourth channel of the tokens, so that packed weights go to the tensor core's operand layout as they
are and are expanded there, in registers. A nibble's bits, moved to where bf16 keeps its sign, its two lowest exponent
bits and its highest mantissa bit, are the weight times 2^-126, 0.5 included (it is subnormal), so that one
multiplication by the block's scale makes the weight. Two weights take 4.5 instructions.

MXFP4 has a power of two for GROUP = 32 channels, NVFP4 an E4M3 value for GROUP = 16, whose product with a weight has no
more bits than bf16 keeps, and a factor of each expert's matrices, by which sums are multiplied.

The scales of four neighbouring blocks of K are copied together. Where a kernel reads more weights than it writes
results, it takes the rows of a tile in the order in which their scales lie (`row_of`), so that those of a tile are one
piece of memory; the rows of weights are far apart anyway.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from .._arithmetic import dot
from .._pdl_triton import wait
from . import LARGEST_SCALE_BYTE as _LARGEST_SCALE_BYTE

LARGEST_SCALE_BYTE = tl.constexpr(_LARGEST_SCALE_BYTE)
SHIFTS = 4
"""int32 behind the offsets that `sort_pairs` writes, see `shifts_of`."""
UNSCALE = tl.constexpr(2.0**63)
"""Weights are made times 2^-63, which lets bf16 hold 2^126 times any scale up to 2^64; sums are multiplied by this."""


def _nibble(shift: int, mask: int, copies: int) -> tl.constexpr:
    """PTX that makes bf16 weights * 2^-63 of one nibble of the two words in a register.

    A multiplication makes two copies of their nibbles, of which the mask keeps the sign of one and the other three bits
    of the other. One operation per nibble: of one with four results Triton 3.8 computes only the first where the tensor
    cores want it, and sends the others there through shared memory.
    """
    return tl.constexpr(
        f"{{ .reg .b32 a, zero; mov.b32 zero, 0x80008000; shr.u32 a, $1, {shift}; and.b32 a, a, {mask}; "
        f"mul.lo.u32 a, a, {copies}; and.b32 a, a, 0x81C081C0; fma.rn.bf16x2 $0, a, $2, zero; }}"
    )


NIBBLE_0 = _nibble(0, 0x000F000F, 0x1040)
NIBBLE_1 = _nibble(0, 0x00F000F0, 0x104)
NIBBLE_2 = _nibble(8, 0x000F000F, 0x1040)
NIBBLE_3 = _nibble(8, 0x00F000F0, 0x104)


@triton.constexpr_function
def group_of(scales):
    """GROUP by the dtype of the scales."""
    return 16 if scales == tl.float8e4nv else 32


@triton.jit
def words(packed_ptr):
    """Packed bytes as int16, four weights each."""
    return packed_ptr.to(tl.pointer_type(tl.int16))


@triton.jit
def row_of(place, SORTED: tl.constexpr):
    """The row of weights at a place in the tiles: itself if SORTED, else as scales lie: 0, 32, 64, 96, 1, 33, …"""
    if SORTED:
        return place
    else:
        return place // 128 * 128 + place % 4 * 32 + place % 128 // 4


@triton.jit
def scales_of(s_ptr, place, K: tl.constexpr, GROUP: tl.constexpr, SORTED: tl.constexpr):
    """Pointer to the first scale of `row_of(place)`, whose weights have K channels; the others are at `scale_at`.

    Each is the first of four that lie together, at a multiple of four.
    """
    s = s_ptr + place // 128 * (128 * K // GROUP)
    if SORTED:
        return s + (place % 32 * 16 + place % 128 // 32 * 4)
    else:
        return s + place % 128 * 4


@triton.jit
def scale_at(start, DEPTH: tl.constexpr, GROUP: tl.constexpr):
    """Offsets [DEPTH / (GROUP / 4)] of the scales of DEPTH words from word `start` on, both multiples of 32."""
    block = tl.arange(0, DEPTH // (GROUP // 4))
    return start * (512 // GROUP) + (block // 4 * 512 + block % 4)


@triton.jit
def shifts_of(offsets_ptr, E: tl.constexpr, T: tl.constexpr):
    """Shifts int32 [4] of the four scales in a word, as `sort_pairs` leaves them; None where scales are read as bytes.

    Triton 3.8 lays out both operands of a product for the narrowest type that one of them was loaded as, by bytes four
    neighbouring channels to a thread, of which the tensor core wants two: more than a move for each of its
    instructions. So scales are loaded by fours, and these shifts are loaded too, since only what is loaded may go into
    weights that are to be expanded in registers. Tiles of 16 tokens wait for memory, and were slower by it.
    """
    if T > 16:
        return tl.load(offsets_ptr + E + 1 + tl.arange(0, 4))
    else:
        return None


@triton.jit
def dequantise(packed, scale, ASM: tl.constexpr):
    """packed int16 and scale int32 (bf16 scale * 2^63 in both halves) [R, D] to four [R, D]: weights * 2^-63 by nibble.

    bf16, or fp32 in the interpreter.
    """
    if ASM:
        w0 = _assembled(packed, scale, NIBBLE_0)
        w1 = _assembled(packed, scale, NIBBLE_1)
        w2 = _assembled(packed, scale, NIBBLE_2)
        w3 = _assembled(packed, scale, NIBBLE_3)
        return w0, w1, w2, w3
    else:
        bits = packed.to(tl.int32)
        factor = (scale << 16).to(tl.float32, bitcast=True)
        w0 = (((bits & 0x8) << 28) | ((bits & 0x7) << 22)).to(tl.float32, bitcast=True)
        w1 = (((bits & 0x80) << 24) | ((bits & 0x70) << 18)).to(tl.float32, bitcast=True)
        w2 = (((bits & 0x800) << 20) | ((bits & 0x700) << 14)).to(tl.float32, bitcast=True)
        w3 = (((bits & 0x8000) << 16) | ((bits & 0x7000) << 10)).to(tl.float32, bitcast=True)
        return w0 * factor, w1 * factor, w2 * factor, w3 * factor


@triton.jit
def _assembled(packed, scale, ASSEMBLY: tl.constexpr):
    return tl.inline_asm_elementwise(ASSEMBLY, "=r,r,r,r", [packed, scale], dtype=tl.bfloat16, is_pure=True, pack=2)


@triton.jit
def _bf16(word):
    return word.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def product(
    w, s, x, column_live, R: tl.constexpr, C: tl.constexpr, K: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, PLANE: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr, shifts=None,
):  # fmt: skip
    """fp32 [R, C] of weight rows at w int16, s uint8 [R] times tokens at x [C], times 2^-63, over K channels.

    With `shifts_of`, scales are read by fours. x points to four bf16 planes, channels 0, 4, 8, … and 1, 5, 9, … and so
    on, PLANE elements apart; or with PLANE = 0 to int64 that hold four neighbouring channels. Tokens that are not live
    are not read and give 0.
    """
    acc = tl.zeros((R, C), tl.float32)
    WORDS: tl.constexpr = K // 4
    SHARING: tl.constexpr = GROUP // 4
    for start in tl.range(0, WORDS, DEPTH, num_stages=STAGES):
        word = start + tl.arange(0, DEPTH)
        if shifts is None:
            at = s[:, None] + scale_at(start, DEPTH, GROUP)[None, :]
        else:
            four = start * (128 // GROUP) + tl.arange(0, DEPTH // GROUP) * 128
            at = s.to(tl.pointer_type(tl.int32))[:, None] + four[None, :]
        x_mask = column_live[None, :]
        if WORDS % DEPTH:
            x_mask = x_mask & (word < WORDS)[:, None]
            packed = tl.load(w[:, None] + word[None, :], mask=(word < WORDS)[None, :], other=0)
            if shifts is None:
                inside = start // SHARING + tl.arange(0, DEPTH // SHARING) < WORDS // SHARING
            else:
                inside = start // GROUP + tl.arange(0, DEPTH // GROUP) < WORDS // GROUP
            scale = tl.load(at, mask=inside[None, :], other=0)
        else:
            packed = tl.load(w[:, None] + word[None, :])
            scale = tl.load(at)
        if shifts is not None:
            scale = tl.reshape((scale[:, :, None] >> shifts[None, None, :]) & 0xFF, (R, DEPTH // SHARING))
        acc = add_step(acc, packed, scale, x[None, :] + word[:, None], x_mask, R, DEPTH, GROUP, PLANE, ASM)
    return acc


@triton.jit
def add_step(
    acc, packed, scale, x, x_mask, R: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr, PLANE: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """acc + weights times tokens, as `product`: packed [R, DEPTH], scale bytes of its groups, x at [DEPTH, C]."""
    SHARING: tl.constexpr = GROUP // 4
    if GROUP == group_of(tl.float8e4nv):
        value = scale.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float32)
        # NaN, which the interpreter reads as 480, counts as 0.
        bits = (tl.where(tl.abs(value) <= 448, value, 0.0) * UNSCALE).to(tl.int32, bitcast=True)
        scale = bits | ((bits >> 16) & 0xFFFF)
    else:
        exponent = scale.to(tl.int32)
        scale = tl.where(exponent > LARGEST_SCALE_BYTE, 0, (exponent + 63) << 7) * 0x10001
    scale = tl.reshape(tl.broadcast_to(scale[:, :, None], (R, DEPTH // SHARING, SHARING)), (R, DEPTH))
    w0, w1, w2, w3 = dequantise(packed, scale, ASM)
    if PLANE:
        x0 = tl.load(x, mask=x_mask, other=0.0)
        x1 = tl.load(x + PLANE, mask=x_mask, other=0.0)
        x2 = tl.load(x + 2 * PLANE, mask=x_mask, other=0.0)
        x3 = tl.load(x + 3 * PLANE, mask=x_mask, other=0.0)
    else:
        four = tl.load(x, mask=x_mask, other=0)
        x0 = _bf16(four)
        x1 = _bf16(four >> 16)
        x2 = _bf16(four >> 32)
        x3 = _bf16(four >> 48)
    acc = dot(w0, x0, acc)
    acc = dot(w1, x1, acc)
    acc = dot(w2, x2, acc)
    return dot(w3, x3, acc)


@triton.jit
def unscaled(acc, factor_ptr):
    """Sums of weights * 2^-63, as they are to be: times the factor of the weights, if they have one."""
    acc = acc * UNSCALE
    if factor_ptr is not None:
        acc = acc * tl.load(factor_ptr)
    return acc


@triton.jit
def diagonal(acc, R: tl.constexpr, T: tl.constexpr, SPLIT: tl.constexpr):
    """[R, SPLIT * T], stretches of K outermost in both dimensions, to [R / SPLIT, T]: equal stretches summed."""
    if SPLIT == 1:
        return acc
    else:
        parts = tl.reshape(acc, (SPLIT, R // SPLIT, SPLIT, T))
        equal = tl.arange(0, SPLIT)[:, None] == tl.arange(0, SPLIT)[None, :]
        parts = tl.where(equal[:, None, :, None], parts, 0.0)
        return tl.sum(tl.sum(parts, 2), 0)


@triton.jit
def members(ids_ptr, ids_stride, pairs, t, SLOTS: tl.constexpr, PAIRS: tl.constexpr, T: tl.constexpr):
    """(expert, pair int32 [T], live [T]): up to T pairs with one expert, group program_id(1); expert -1: nothing to do.

    One group per pair; every T-th pair of an expert works for itself and the T - 1 after it, the others rest.
    PAIRS = 0, one row: every pair works for itself.
    """
    here = tl.program_id(1)
    expert = tl.load(ids_ptr + (here // SLOTS).to(tl.int64) * ids_stride + here % SLOTS).to(tl.int32)
    if PAIRS == 0:
        pair = here + t
        live = (t == 0) & (expert >= 0)
        pair = tl.where(live, pair, 0)
    else:
        index = tl.arange(0, PAIRS)
        place = ids_ptr + (index // SLOTS).to(tl.int64) * ids_stride + index % SLOTS
        same = (tl.load(place, mask=index < pairs, other=-1).to(tl.int32) == expert).to(tl.int32)
        before = tl.sum(tl.where(index < here, same, 0))
        rank = tl.cumsum(same) - 1 - before
        found = (same[None, :] != 0) & (rank[None, :] == t[:, None])
        pair = tl.sum(tl.where(found, index[None, :], 0), 1)
        live = tl.sum(found.to(tl.int32), 1) != 0
        expert = tl.where(before % T == 0, expert, -1)
    return expert, pair, live


@triton.jit
def sorted_group(offsets_ptr, E: tl.constexpr, BOUND: tl.constexpr, T: tl.constexpr):
    """(expert, first place in the order of `sort_pairs`, pairs, T at most) of group program_id(1); expert -1: none."""
    here = tl.program_id(1)
    e = tl.arange(0, BOUND)
    size = tl.load(offsets_ptr + e + 1, mask=e < E, other=0) - tl.load(offsets_ptr + e, mask=e < E, other=0)
    ends = tl.cumsum((size + T - 1) // T)
    expert = tl.sum((ends <= here).to(tl.int32))
    first = tl.max(tl.where(ends <= here, ends, 0))
    bounded = tl.minimum(expert, E - 1)
    begin = tl.load(offsets_ptr + bounded) + (here - first) * T
    count = tl.minimum(tl.load(offsets_ptr + bounded + 1) - begin, T)
    return tl.where(expert < E, expert, -1), begin, tl.where(expert < E, count, 0)


@triton.jit
def pair_at(order_ptr, at, live, SORTED: tl.constexpr):
    """int32 pairs at live places of the order of `sort_pairs`, or those places if not SORTED."""
    if SORTED:
        return tl.load(order_ptr + at, mask=live, other=0)
    else:
        return at


@triton.jit
def repeat(values, T: tl.constexpr, TIMES: tl.constexpr):
    """[T] to [TIMES * T]."""
    if TIMES == 1:
        return values
    else:
        return tl.reshape(tl.broadcast_to(values[None, :], (TIMES, T)), (TIMES * T,))


@triton.jit
def to_planes(x_ptr, planes_ptr, K: tl.constexpr, X_STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """planes bf16 [rows, 4, K/4]: channels 0, 4, 8, … of x [rows, K], then 1, 5, 9, … and so on."""
    wait()
    row = tl.program_id(0).to(tl.int64)
    word = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = word < K // 4
    four = tl.load(x_ptr.to(tl.pointer_type(tl.int64)) + row * (X_STRIDE // 4) + word, mask=inside, other=0)
    to = planes_ptr + row * K + word
    for plane in tl.static_range(4):
        tl.store(to + plane * (K // 4), _bf16(four >> (16 * plane)), mask=inside)


@triton.jit(do_not_specialize=["pairs", "ids_stride"])
def sort_pairs(
    ids_ptr, offsets_ptr, order_ptr, pairs, ids_stride, E: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr
):
    """order int32 [pairs]: pairs of expert 0, of expert 1, …; offsets int32 [E + 5]: where each expert's begin, and
    `shifts_of`.

    One program per expert counts the pairs of the experts before it, then writes its own behind them, in order.
    """
    wait()
    expert = tl.program_id(0)
    less = tl.zeros((BLOCK,), tl.int32)
    equal = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, pairs, BLOCK):
        index = start + tl.arange(0, BLOCK)
        place = ids_ptr + (index // SLOTS).to(tl.int64) * ids_stride + index % SLOTS
        ids = tl.load(place, mask=index < pairs, other=-1).to(tl.int32)
        less += ((ids >= 0) & (ids < expert)).to(tl.int32)
        equal += (ids == expert).to(tl.int32)
    begin = tl.sum(less)
    count = tl.sum(equal)
    tl.store(offsets_ptr + expert, begin)
    if expert == E - 1:
        tl.store(offsets_ptr + E, begin + count)
        tl.store(offsets_ptr + E + 1 + tl.arange(0, 4), tl.arange(0, 4) * 8)
    if count > 0:
        for start in range(0, pairs, BLOCK):
            index = start + tl.arange(0, BLOCK)
            place = ids_ptr + (index // SLOTS).to(tl.int64) * ids_stride + index % SLOTS
            ids = tl.load(place, mask=index < pairs, other=-1).to(tl.int32)
            same = (ids == expert).to(tl.int32)
            tl.store(order_ptr + begin + tl.cumsum(same) - 1, index, mask=same != 0)
            begin += tl.sum(same)
