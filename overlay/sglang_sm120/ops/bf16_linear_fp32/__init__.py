"""Linear layer with bf16 weights whose result stays fp32 (compressors, expert gate)."""

from __future__ import annotations

import torch

from ...registry import Op

__all__ = ["bf16_linear_fp32"]


@Op
def bf16_linear_fp32(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """y = x wᵀ: x bf16 [T, K], w bf16 [N, K], fp32 products and sums. Returns fp32 [T, N]."""
    return x.float() @ w.float().T
