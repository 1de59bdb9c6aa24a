"""Triton provider of `mhc_head`: see `ops._mhc_triton`."""

from __future__ import annotations

import torch

from .._mhc_triton import contiguous, enter
from . import mhc_head

__all__ = ["mhc_head_triton"]


def _accepts(x: torch.Tensor, fn: torch.Tensor) -> str | None:
    return contiguous(x=x, fn=fn)


@mhc_head.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def mhc_head_triton(
    x: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    rms_eps: float = 1e-6,
    hc_eps: float = 1e-6,
) -> torch.Tensor:
    """The entry of a block with four mixes, which are gates alone."""
    return enter("mhc_head", None, x, fn, scale, base, 1, rms_eps, hc_eps, None, 0.0)[1]
