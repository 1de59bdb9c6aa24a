"""Triton provider of `mhc_post_pre`: see `ops._mhc_triton`."""

from __future__ import annotations

import torch

from ...registry import Arguments
from .._mhc_triton import contiguous, enter
from . import mhc_post_pre


def _accepts(a: Arguments) -> str | None:
    return contiguous(a, "f", "x", "post", "comb", "fn")


@mhc_post_pre.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def mhc_post_pre_triton(a: Arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two launches: X' with its products and squares, then gates, Sinkhorn, combine and norm."""
    return enter("mhc_post_pre", a, (a.f, a.post, a.comb))
