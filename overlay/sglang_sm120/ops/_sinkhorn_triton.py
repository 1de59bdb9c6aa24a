"""Sinkhorn normalisation of 4 x 4 matrices in Triton: a thread has a whole matrix, so that nothing is exchanged."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from ._arithmetic import scaled_sum
from ._pdl_triton import INTERPRETED


@triton.jit
def _reciprocal(a):
    """1 / a to one unit in the last place; no division, whose slow path and Newton step would be on the chain."""
    if INTERPRETED:
        return 1.0 / a
    return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _reciprocals(a, b, c, d):
    """1 / a … 1 / d from two reciprocals, which the hardware makes at an eighth of the rate of products."""
    ab = _reciprocal(a * b)
    cd = _reciprocal(c * d)
    return b * ab, a * ab, d * cd, c * cd


@triton.jit
def plus_dot(start, a0, a1, a2, a3, b0, b1, b2, b3):
    """start + Σ a_i b_i."""
    return scaled_sum(a3, b3, scaled_sum(a2, b2, scaled_sum(a1, b1, scaled_sum(a0, b0, start))))


@triton.jit
def _softmax(a, b, c, d, eps):
    """softmax(a, b, c, d) + eps."""
    top = tl.maximum(tl.maximum(a, b), tl.maximum(c, d))
    a, b, c, d = tl.exp(a - top), tl.exp(b - top), tl.exp(c - top), tl.exp(d - top)
    scale = _reciprocal((a + b) + (c + d))
    return a * scale + eps, b * scale + eps, c * scale + eps, d * scale + eps


@triton.jit
def _split(m, N: tl.constexpr):
    """[R, N] as its even and its odd columns [R, N / 2]."""
    return tl.split(tl.reshape(m, m.shape[0], N // 2, 2))


@triton.jit
def four_columns(m):
    """The four columns of [R, 4], as [R] each."""
    even, odd = _split(m, 4)
    m0, m2 = tl.split(even)
    m1, m3 = tl.split(odd)
    return m0, m1, m2, m3


@triton.jit
def _rows(m):
    """[R, 16] as the rows of 4 x 4 matrices, [R, 4] each."""
    m = tl.trans(tl.reshape(m, m.shape[0], 4, 4), 0, 2, 1)
    even, odd = tl.split(tl.reshape(m, m.shape[0], 4, 2, 2))
    m0, m2 = tl.split(even)
    m1, m3 = tl.split(odd)
    return m0, m1, m2, m3


@triton.jit
def sinkhorn(logits, at, live, eps, ITERS: tl.constexpr):
    """logits [R, 16] → doubly stochastic matrices, stored at `at` [R], as in `_math.sinkhorn`.

    A thread has whole matrices. comb = r_i k_ij c_j throughout, so only r and c are iterated: dividing row i by its sum
    + eps makes 1 / r_i the sum Σ_j k_ij c_j + eps / r_i, and a column likewise.
    """
    l0, l1, l2, l3 = _rows(logits)
    l00, l01, l02, l03 = four_columns(l0)
    l10, l11, l12, l13 = four_columns(l1)
    l20, l21, l22, l23 = four_columns(l2)
    l30, l31, l32, l33 = four_columns(l3)
    k00, k01, k02, k03 = _softmax(l00, l01, l02, l03, eps)
    k10, k11, k12, k13 = _softmax(l10, l11, l12, l13, eps)
    k20, k21, k22, k23 = _softmax(l20, l21, l22, l23, eps)
    k30, k31, k32, k33 = _softmax(l30, l31, l32, l33, eps)
    one = tl.full(k00.shape, 1.0, tl.float32)
    u0, u1, u2, u3 = one, one, one, one
    r0, r1, r2, r3 = one, one, one, one
    v0 = (k00 + k10) + (k20 + k30) + eps
    v1 = (k01 + k11) + (k21 + k31) + eps
    v2 = (k02 + k12) + (k22 + k32) + eps
    v3 = (k03 + k13) + (k23 + k33) + eps
    c0, c1, c2, c3 = _reciprocals(v0, v1, v2, v3)
    for _ in range(ITERS - 1):
        u0 = plus_dot(u0 * eps, k00, k01, k02, k03, c0, c1, c2, c3)
        u1 = plus_dot(u1 * eps, k10, k11, k12, k13, c0, c1, c2, c3)
        u2 = plus_dot(u2 * eps, k20, k21, k22, k23, c0, c1, c2, c3)
        u3 = plus_dot(u3 * eps, k30, k31, k32, k33, c0, c1, c2, c3)
        r0, r1, r2, r3 = _reciprocals(u0, u1, u2, u3)
        v0 = plus_dot(v0 * eps, k00, k10, k20, k30, r0, r1, r2, r3)
        v1 = plus_dot(v1 * eps, k01, k11, k21, k31, r0, r1, r2, r3)
        v2 = plus_dot(v2 * eps, k02, k12, k22, k32, r0, r1, r2, r3)
        v3 = plus_dot(v3 * eps, k03, k13, k23, k33, r0, r1, r2, r3)
        c0, c1, c2, c3 = _reciprocals(v0, v1, v2, v3)
    _store_four(at, live, r0, k00 * c0, k01 * c1, k02 * c2, k03 * c3)
    _store_four(at + 4, live, r1, k10 * c0, k11 * c1, k12 * c2, k13 * c3)
    _store_four(at + 8, live, r2, k20 * c0, k21 * c1, k22 * c2, k23 * c3)
    _store_four(at + 12, live, r3, k30 * c0, k31 * c1, k32 * c2, k33 * c3)


@triton.jit
def _store_four(at, live, factor, a, b, c, d):
    tl.store(at, factor * a, mask=live)
    tl.store(at + 1, factor * b, mask=live)
    tl.store(at + 2, factor * c, mask=live)
    tl.store(at + 3, factor * d, mask=live)
