"""Triton provider of `mhc_post_pre`: see `ops._mhc_triton`."""

from __future__ import annotations

import torch

from .._mhc_triton import contiguous, enter
from . import mhc_post_pre

__all__ = ["mhc_post_pre_triton"]


def _accepts(f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor, fn: torch.Tensor) -> str | None:
    return contiguous(f=f, x=x, post=post, comb=comb, fn=fn)


@mhc_post_pre.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def mhc_post_pre_triton(
    f: torch.Tensor,
    x: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    iters: int = 20,
    rms_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two launches: X' with its products and squares, then gates, Sinkhorn, combine and norm."""
    block = (f, post, comb)
    return enter("mhc_post_pre", block, x, fn, scale, base, iters, rms_eps, hc_eps, norm_weight, norm_eps)
