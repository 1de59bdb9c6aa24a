"""NVFP4 weights: E2M1 values packed as in `mxfp4`, one E4M3 scale per 16 values along K, one fp32 factor a matrix.

A dequantised weight is `E2M1_VALUES[nibble] * scale * factor`. The product with the scale has six significant bits, so
that bf16 and fp32 hold it exactly; the one with the factor is rounded. SM120's tensor cores want the scale bytes
swizzled as MXFP4's (`mxfp4.swizzle_scales`).
"""

from __future__ import annotations

import torch

from . import mxfp4

BLOCK = 16
"""Values along K that share one scale."""
LARGEST_SCALE = 448.0


def quantise(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """fp32 [N, K] to (packed uint8 [N, K/2], scale float8_e4m3fn [N, K/16], factor fp32 []); K is a multiple of 16.

    As TensorRT Model Optimizer does: the factor brings the largest scale to 448, a scale is the E4M3 value nearest to
    its block's largest magnitude / 6 / factor. Values round to the nearest E2M1 value, ties to the even code; the
    largest of a block whose scale was rounded down is cut off at 6 scales, by a sixteenth at most where the scale is
    2^-6 or more. Values must be finite. Of a matrix of zeros the factor is 1.
    """
    if w.shape[-1] % BLOCK:
        raise ValueError(f"NVFP4 rows have {w.shape[-1]} values and need a multiple of {BLOCK}; pad K.")
    blocks = w.float().unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1)
    factor = amax.amax() / (LARGEST_SCALE * 6)
    factor = torch.where(factor > 0, factor, torch.ones_like(factor))
    scale = (amax / 6 / factor).clamp(max=LARGEST_SCALE).to(torch.float8_e4m3fn)
    # A scale of 0 means values below 6 * 2^-10 factors, which become 0 when divided by a whole one.
    divisor = torch.where(scale.float() > 0, scale.float(), torch.ones(())) * factor
    return mxfp4.pack(mxfp4.nearest(blocks / divisor.unsqueeze(-1)).flatten(-2)), scale, factor


def dequantise(packed: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """(packed uint8|int8 [..., K/2], scale float8_e4m3fn [..., K/16], factor fp32 []) to fp32 [..., K].

    Exact but for one rounding of the product with the factor. A scale of NaN gives NaN.
    """
    codes = mxfp4.unpack(packed)
    if scale.dtype != torch.float8_e4m3fn:
        raise TypeError(f"NVFP4 scales have dtype {scale.dtype} and need float8_e4m3fn.")
    if codes.shape[-1] != scale.shape[-1] * BLOCK:
        raise ValueError(
            f"NVFP4 rows have {codes.shape[-1]} values and {scale.shape[-1]} scales; "
            f"they need one scale per {BLOCK} values."
        )
    values = torch.tensor(mxfp4.E2M1_VALUES, device=packed.device)[codes.int()]
    return (values.unflatten(-1, (-1, BLOCK)) * scale.float().unsqueeze(-1)).flatten(-2) * factor
