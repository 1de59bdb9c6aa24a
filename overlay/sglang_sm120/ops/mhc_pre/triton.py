"""Triton provider of `mhc_pre`: see `ops._mhc_triton`."""

from __future__ import annotations

import torch

from .._mhc_triton import contiguous, enter
from . import mhc_pre

__all__ = ["mhc_pre_triton"]


def _accepts(x: torch.Tensor, fn: torch.Tensor) -> str | None:
    return contiguous(x=x, fn=fn)


@mhc_pre.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def mhc_pre_triton(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    iters: int = 20,
    rms_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two launches: products and squares of X, then gates, Sinkhorn, combine and norm."""
    _, y, post, comb = enter("mhc_pre", None, x, fn, scale, base, iters, rms_eps, hc_eps, norm_weight, norm_eps)
    return y, post, comb
