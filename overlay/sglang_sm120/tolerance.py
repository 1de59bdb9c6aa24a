"""How close a provider's result must be to its op's torch reference."""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """Bounds on the RMS error over the RMS value and on the largest error over the largest value."""

    rms: float
    largest: float


EXACT = Tolerance(0, 0)
"""Copies, gathers, dequantisation, selection and planning compute nothing that rounds."""
FP32 = Tolerance(1e-5, 1e-4)
"""fp32 sums in another order differ by some 1e-7 of their terms; cancellation leaves 1e-5 of the result."""
BF16 = Tolerance(1e-3, 1e-2)
"""One rounding to bf16: where fp32 sums differ in the last bits, a few round the other way, by 2^-8."""
FP8 = Tolerance(5e-3, 0.075)
"""One rounding to E4M3: a few values round the other way, by up to a step of the largest binade, 32/448."""
E4M3_FLIPS = Tolerance(5e-3, 0.05)
"""Operands rounded to E4M3 on the way, of fp32 sums in another order: one in some ten thousand rounds the other way, by
up to 2^-3, and more where sums cancel; a result of many such operands is off by a part of that."""
