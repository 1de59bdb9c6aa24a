"""FP8 block weights: E4M3 values, one scale per 128 x 128 block of a [N, K] matrix.

Checkpoints hold power-of-two scales as E8M0 bytes; servers may hold the same values as fp32. The last block
of a dimension that is not a multiple of 128 is partial. A dequantised weight is `value * scale`, exact in
fp32 for E8M0 scales.
"""

from __future__ import annotations

import torch

from . import e8m0

BLOCK = 128
"""Rows and columns that share one scale."""

FP8_MAX = 448.0


class NotBlocks(ValueError):
    """A bf16 weight that was not dequantised from FP8 blocks with power-of-two scales."""


def quantise(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 [N, K] to (float8_e4m3fn [N, K], float8_e8m0fnu [ceil(N/128), ceil(K/128)]).

    The scale is the smallest power of two that brings the block's largest magnitude to 448 or less. Values
    must be finite.
    """
    n, k = w.shape
    padded = torch.nn.functional.pad(w.float(), (0, -k % BLOCK, 0, -n % BLOCK))
    amax = padded.abs().unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).amax((1, 3))
    scale = e8m0.from_amax(amax, FP8_MAX)
    return (w.float() / _expand(e8m0.to_float(scale), n, k)).to(torch.float8_e4m3fn), scale


def dequantise(w8: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(float8_e4m3fn [N, K], scale fp32|float8_e8m0fnu [ceil(N/128), ceil(K/128)]) to fp32 [N, K]."""
    n, k = w8.shape
    blocks = (-(-n // BLOCK), -(-k // BLOCK))
    if tuple(scale.shape) != blocks:
        raise ValueError(f"FP8 weight [{n}, {k}] has scales {list(scale.shape)} and needs {list(blocks)}.")
    values = scale.float() if scale.dtype == torch.float32 else e8m0.to_float(scale)
    return w8.float() * _expand(values, n, k)


def requantise(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 [N, K] that was dequantised from FP8 blocks with power-of-two scales, back to (e4m3 [N, K], scale fp32).

    Bit-exact: `quantise` takes the smallest scale, and with it every value that a larger one could express is a value
    of E4M3 too.

    Raises:
        NotBlocks: the weight is no such matrix.
    """
    w8, scale = quantise(w)
    values = e8m0.to_float(scale)
    if not torch.equal(dequantise(w8, values), w.float()):
        raise NotBlocks(
            f"A bf16 weight [{w.shape[0]}, {w.shape[1]}] is not made of FP8 blocks with power-of-two scales."
        )
    return w8, values


def _expand(scale: torch.Tensor, n: int, k: int) -> torch.Tensor:
    return scale.repeat_interleave(BLOCK, 0)[:n].repeat_interleave(BLOCK, 1)[:, :k]
