"""MXFP8 activations: E4M3 values, one E8M0 scale per 32 values along K.

The scale is the smallest power of two that brings a block's largest magnitude to 448 or less, so nothing saturates.
OCP's own rule, 2^(floor(log2(amax)) - 8), is half of that where the largest is above 1.75 times a power of two, and
cuts it off there by up to an eighth; E4M3 is floating, so the larger scale costs bits of values below 2^-14 of the
largest alone. Rounding is to nearest, ties to even: a value of at least 2^-6 of its scale is off by 2^-4 of itself at
most, a smaller one by 2^-10 of its scale.
"""

from __future__ import annotations

import torch

from . import e8m0

BLOCK = 32
"""Values along K that share one scale."""
LARGEST = 448.0
SMALLEST_SCALE_BYTE = 58
"""2^-69; `ops.mxfp4_moe` gives up what is smaller for a weight's scale of 0. A block of zeros has it too."""


def quantise(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[..., K] to (float8_e4m3fn [..., K], float8_e8m0fnu [..., K/32]); K is a multiple of 32.

    A block with an infinity or NaN is NaN, its scale unspecified.
    """
    if x.shape[-1] % BLOCK:
        raise ValueError(f"MXFP8 rows have {x.shape[-1]} values and need a multiple of {BLOCK}; pad K.")
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    finite = amax.isfinite()
    smallest = LARGEST * 2.0 ** (SMALLEST_SCALE_BYTE - 127)
    scale = e8m0.from_amax(amax.where(finite, torch.ones_like(amax)).clamp(min=smallest), LARGEST)
    values = (blocks / e8m0.to_float(scale).unsqueeze(-1)).masked_fill(~finite.unsqueeze(-1), torch.nan)
    return values.to(torch.float8_e4m3fn).flatten(-2), scale


def dequantise(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(float8_e4m3fn [..., K], float8_e8m0fnu|uint8 [..., K/32]) to fp32 [..., K], exactly below 2^128."""
    return (values.float().unflatten(-1, (-1, BLOCK)) * e8m0.to_float(scale).unsqueeze(-1)).flatten(-2)


def rounded(x: torch.Tensor) -> torch.Tensor:
    """fp32 [..., K]: what MXFP8 keeps of x."""
    return dequantise(*quantise(x))
