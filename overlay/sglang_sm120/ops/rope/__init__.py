"""Rotary position embedding in place."""

from __future__ import annotations

import torch

from ...registry import Op
from .._math import rotate

__all__ = ["rope"]


@Op
def rope(x: torch.Tensor, freqs_cis: torch.Tensor, positions: torch.Tensor, inverse: bool = False) -> None:
    """Rotate x bf16 [T, ..., 64] (any strides) in place: fp32 products, rounded once.

    Channels 2i and 2i+1 form a complex number that is multiplied by freqs_cis[positions[t], i] (complex64
    [S, 32]), or by the conjugate when inverse, which undoes the rotation. positions int [T].
    """
    x.copy_(rotate(x, freqs_cis, positions, inverse))
