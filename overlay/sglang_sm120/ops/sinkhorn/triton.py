"""Triton provider of `sinkhorn`: see `ops._mhc_triton`."""

from __future__ import annotations

import torch

from ...registry import Arguments
from .._mhc_triton import contiguous, mixing_weights
from . import sinkhorn


def _accepts(a: Arguments) -> str | None:
    return contiguous(a, "mixes")


@sinkhorn.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def sinkhorn_triton(a: Arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One launch; a thread holds a whole 4 x 4 matrix."""
    return mixing_weights(a.mixes, a.scale, a.base, a.iters, a.eps)
