"""Triton provider of `fp8_linear`: see `ops._linear_triton`."""

from __future__ import annotations

import torch

from .._linear_triton import linear, refusal
from . import fp8_linear

__all__ = ["fp8_linear_triton"]


def _accepts(w: torch.Tensor, scale: torch.Tensor, norm_weight: torch.Tensor | None = None) -> str | None:
    if norm_weight is not None and not norm_weight.is_contiguous():
        return f"norm_weight has stride {norm_weight.stride()} and needs to be contiguous."
    return refusal(w, scale)


@fp8_linear.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def fp8_linear_triton(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """One group of `linear`; leading dimensions become rows."""
    norm = None if norm_weight is None else (norm_weight, eps)
    y = linear("fp8_linear", x.reshape(-1, 1, x.shape[-1]), w.unsqueeze(0), scale.unsqueeze(0), torch.bfloat16, norm)
    return y.view(*x.shape[:-1], w.shape[0])
