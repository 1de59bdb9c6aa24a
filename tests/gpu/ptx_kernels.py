"""Kernels that hold nothing but the overlay's inline PTX, to try it on every operand that matters."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from sglang_sm120.ops._arithmetic import scaled_sum
from sglang_sm120.ops._mhc_triton import _rounded, _stream, _two_bf16
from sglang_sm120.ops._sinkhorn_triton import _reciprocal
from sglang_sm120.ops.mxfp4_moe.grouped import dequantise

BLOCK = 1024


@triton.jit
def nibbles(packed, scale, out, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """out bf16 [4, COUNT] by nibble = weights * 2^-63 of packed int16 [COUNT]; scale int32 [1], as in `dequantise`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    words = tl.load(packed + at)
    w0, w1, w2, w3 = dequantise(words, tl.load(scale) + tl.zeros_like(words).to(tl.int32), True)
    tl.store(out + at, w0)
    tl.store(out + COUNT + at, w1)
    tl.store(out + 2 * COUNT + at, w2)
    tl.store(out + 3 * COUNT + at, w3)


@triton.jit
def split(x, high, low, rounded, BLOCK: tl.constexpr):
    """high, low bf16 and rounded fp32 [N] of x fp32 [N]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at)
    first, second = _two_bf16(value)
    tl.store(high + at, first)
    tl.store(low + at, second)
    tl.store(rounded + at, _rounded(value))


@triton.jit
def arithmetic(a, b, c, stream, total, inverse, BLOCK: tl.constexpr):
    """stream bf16 = a b + c, rounded after the product too, total fp32 = a b + c, inverse fp32 = 1 / a; all [N]."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, z = tl.load(a + at), tl.load(b + at), tl.load(c + at)
    one, none = tl.full((BLOCK,), 1.0, tl.float32), tl.zeros((BLOCK,), tl.float32)
    tl.store(stream + at, _stream(x, y, one, z, none, none, none, none, none, none))
    tl.store(total + at, scaled_sum(x, y, z))
    tl.store(inverse + at, _reciprocal(x))
