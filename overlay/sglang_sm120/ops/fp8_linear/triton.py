"""Triton provider of `fp8_linear`: see `ops._linear_triton`."""

from __future__ import annotations

import torch

from .._linear_triton import linear, refusal
from . import fp8_linear

__all__ = ["fp8_linear_triton"]


def _accepts(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> str | None:
    return refusal(w, scale)


@fp8_linear.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def fp8_linear_triton(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """One group of `linear`; leading dimensions become rows."""
    y = linear("fp8_linear", x.reshape(-1, 1, x.shape[-1]), w.unsqueeze(0), scale.unsqueeze(0), torch.bfloat16)
    return y.view(*x.shape[:-1], w.shape[0])
