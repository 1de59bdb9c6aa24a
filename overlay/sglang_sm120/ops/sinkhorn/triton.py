"""Triton provider of `sinkhorn`: see `ops._mhc_triton`."""

from __future__ import annotations

import torch

from .._mhc_triton import contiguous, mixing_weights
from . import sinkhorn

__all__ = ["sinkhorn_triton"]


def _accepts(mixes: torch.Tensor) -> str | None:
    return contiguous(mixes=mixes)


@sinkhorn.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def sinkhorn_triton(
    mixes: torch.Tensor, scale: torch.Tensor, base: torch.Tensor, iters: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One launch; a thread holds a whole 4 x 4 matrix."""
    return mixing_weights(mixes, scale, base, iters, eps)
