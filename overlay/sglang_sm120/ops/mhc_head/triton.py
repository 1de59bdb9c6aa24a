"""Triton provider of `mhc_head`: see `ops._mhc_triton`."""

from __future__ import annotations

import torch

from ...registry import Arguments
from .._mhc_triton import contiguous, enter
from . import mhc_head


@mhc_head.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=lambda a: contiguous(a, "x", "fn"))
def mhc_head_triton(a: Arguments) -> torch.Tensor:
    """The entry of a block with four mixes, which are gates alone."""
    return enter("mhc_head", a)[1]
