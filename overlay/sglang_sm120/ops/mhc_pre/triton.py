"""Triton provider of `mhc_pre`: see `ops._mhc_triton`."""

from __future__ import annotations

import torch

from ...registry import Arguments
from .._mhc_triton import contiguous, enter
from . import mhc_pre


@mhc_pre.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=lambda a: contiguous(a, "x", "fn"))
def mhc_pre_triton(a: Arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two launches: products and squares of X, then gates, Sinkhorn, combine and norm."""
    _, y, post, comb = enter("mhc_pre", a)
    return y, post, comb
