"""Triton provider of `fp8_grouped_linear`: see `ops._linear_triton`."""

from __future__ import annotations

import torch

from ...registry import Arguments
from .._linear_triton import linear, refusal
from . import fp8_grouped_linear


@fp8_grouped_linear.provider(
    "triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=lambda a: refusal(a.w, a.scale)
)
def fp8_grouped_linear_triton(a: Arguments) -> torch.Tensor:
    """`linear` as it is: the groups are a grid dimension."""
    return linear("fp8_grouped_linear", a.o, a.w, a.scale, torch.bfloat16)
