"""Routed experts with NVFP4 weights, by the kernels of `mxfp4_moe`."""

from __future__ import annotations

import torch

from ...formats import nvfp4
from ...registry import Arguments
from ..mxfp4_moe.triton import accepts, experts_of, families
from . import nvfp4_moe

FAMILIES = families("nvfp4_moe", nvfp4.BLOCK)


@nvfp4_moe.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=accepts)
def nvfp4_moe_triton(a: Arguments) -> torch.Tensor:
    """Contract in `nvfp4_moe`."""
    return experts_of(a, FAMILIES, a.s13, a.s2, a.g13, a.g2)
