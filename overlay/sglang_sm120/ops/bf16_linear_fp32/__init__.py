"""Linear layer with bf16 weights and fp32 sums (compressors, expert gate, the indexer's head weights)."""

from __future__ import annotations

import torch

from ...registry import Arguments, Op
from .._math import linear_refusal


@Op
def bf16_linear_fp32(x: torch.Tensor, w: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """y = x wᵀ: x bf16 [T, K], w bf16 [N, K], fp32 products and sums. Returns [T, N], fp32 or rounded once to bf16."""
    return (x.float() @ w.float().T).to(dtype)


@bf16_linear_fp32.checked
def _check(a: Arguments) -> str | None:
    return linear_refusal(a.x, a.w)
