"""Arithmetic that all kernels share: each rounds where the torch references round."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from ._pdl_triton import INTERPRETED


@triton.jit
def to_bf16(value):
    """fp32 to the nearest bf16; Triton's interpreter would truncate, so there the bits are rounded first."""
    if INTERPRETED:
        bits = value.to(tl.int32, bitcast=True)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return value.to(tl.bfloat16)


@triton.jit
def dot(a, b, acc=None):
    """fp32 a b of bf16 tiles, added to acc where there is one; Triton's interpreter has no bf16 dot."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc)


@triton.jit
def scaled_sum(product, factor, acc):
    """product * factor + acc, rounded once.

    In assembly, since LLVM would pair the FMAs for SM120's two-wide ones and move every accumulator back and forth.
    """
    if INTERPRETED:
        return product * factor + acc
    return tl.inline_asm_elementwise(
        "fma.rn.f32 $0, $1, $2, $3;", "=f,f,f,f", [product, factor, acc], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def e8m0_value(bits):
    """fp32 2^(e - 127) of exponent bytes: 2^-127 is subnormal, byte 255 is NaN."""
    wide = bits.to(tl.int32)
    wide = tl.where(wide == 0, 0x00400000, tl.where(wide == 255, 0x7FC00000, wide << 23))
    return wide.to(tl.float32, bitcast=True)
