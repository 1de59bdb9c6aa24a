"""What kernels on SM120's block-scaled tensor cores share: activations in MXFP8 (`formats.mxfp8`)."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .. import kernels
from ..formats import mxfp8
from ..registry import Arguments, Own
from ..tolerance import E4M3_FLIPS
from ._pdl_triton import INTERPRETED, wait

BLOCK = tl.constexpr(mxfp8.BLOCK)
SMALLEST = tl.constexpr(mxfp8.SMALLEST_SCALE_BYTE)
RUNS_ON = "cpu sm120 sm121"


def own(emulated: Callable[[Arguments], torch.Tensor]) -> Own:
    """What a provider on these tensor cores says of its arithmetic, which is that of `emulated`."""
    return Own(emulated, E4M3_FLIPS, "rounds activations to FP8 (compiled, never run)")


@triton.jit
def quantise(blocks, SHIFT: tl.constexpr):
    """fp32 [R, B, 32] to (E4M3 [R, B, 32], scale bytes uint8 [R, B], 2^SHIFT too small), as `formats.mxfp8`."""
    largest = tl.max(blocks.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 2)
    exponent = largest >> 23
    byte = exponent - 8 + ((largest & 0x7FFFFF) > 0x600000).to(tl.int32)
    byte = tl.maximum(byte, SMALLEST)
    # 2^(127 - byte); of an infinity and of NaN, NaN.
    factor = tl.where(exponent == 255, 0x7FC00000, (254 - byte) << 23).to(tl.float32, bitcast=True)
    return _to_e4m3(blocks * factor[:, :, None]), (byte - SHIFT).to(tl.uint8)


@triton.jit
def _to_e4m3(value):
    if INTERPRETED:  # Triton 3.8's rounds wrongly, so there the bits are made
        magnitude = tl.abs(value)
        bits = magnitude.to(tl.int32, bitcast=True)
        code = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # A sum with 2^14, whose last bit is the subnormals' step of 2^-9, rounds to such steps and counts them.
        steps = (magnitude + 2.0**14).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 2.0**-6, steps, code)
        code = tl.where(value != value, 0x7F, code) | ((value.to(tl.int32, bitcast=True) >> 24) & 0x80)
        return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        return value.to(tl.float8e4nv)


@triton.jit
def quantise_rows(
    x_ptr, x8_ptr, sx_ptr, K: tl.constexpr, X_STRIDE: tl.constexpr, COUNT: tl.constexpr, EVEN_FIRST: tl.constexpr,
    SHIFT: tl.constexpr,
):  # fmt: skip
    """x8 E4M3 [rows, K] and sx uint8 [rows, K/32], 2^SHIFT too small, of x bf16 [rows, K]; COUNT blocks a program.

    EVEN_FIRST: a block's channels are stored in the order 0, 2, 4, …, then 1, 3, 5, ….
    """
    wait()
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    inside = block < K // BLOCK
    channel = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(x_ptr + row * X_STRIDE + channel, mask=inside[:, None], other=0.0).to(tl.float32)
    values, byte = quantise(tl.reshape(x, (1, COUNT, BLOCK)), SHIFT)
    if EVEN_FIRST:  # data is moved, not addresses, so that neighbours are stored together
        values = tl.permute(tl.reshape(values, (COUNT, BLOCK // 2, 2)), (0, 2, 1))
    values = tl.reshape(values, (COUNT, BLOCK))
    tl.store(x8_ptr + row * K + channel, values, mask=inside[:, None])
    tl.store(sx_ptr + row * (K // BLOCK) + block, tl.reshape(byte, (COUNT,)), mask=inside)


def launch_quantise_rows(x: torch.Tensor, x8: torch.Tensor, sx: torch.Tensor, even_first: bool, shift: int) -> None:
    """`quantise_rows` of x bf16 [rows, K], whose K lies together."""
    rows, k = x.shape
    kernels.launch(
        quantise_rows, (rows, triton.cdiv(k, 64 * mxfp8.BLOCK)), x, x8, sx,
        K=k, X_STRIDE=x.stride(0), COUNT=64, EVEN_FIRST=even_first, SHIFT=shift, num_warps=4,
    )  # fmt: skip
