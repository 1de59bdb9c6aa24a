"""Root-mean-square norm of rows."""

from __future__ import annotations

import torch

from ...registry import Op
from .. import _math

__all__ = ["rms_norm"]


@Op
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x²) + eps) * weight in fp32, rounded once: x bf16 [T, N] of any row stride, weight bf16 [N] → bf16
    [T, N]."""
    return _math.rms_norm(x, weight, eps).to(x.dtype)
