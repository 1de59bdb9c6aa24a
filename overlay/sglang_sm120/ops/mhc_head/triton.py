"""Triton provider of `mhc_head`: see `ops._mhc_triton`."""

from __future__ import annotations

import torch

from ...registry import Arguments
from .._mhc_triton import contiguous, enter
from . import mhc_head


def _accepts(a: Arguments) -> str | None:
    return contiguous(a, "x", "fn")


@mhc_head.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def mhc_head_triton(a: Arguments) -> torch.Tensor:
    """The entry of a block with four mixes, which are gates alone."""
    return enter("mhc_head", None, a, 1, None, 0.0)[1]
