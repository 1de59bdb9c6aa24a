"""Triton provider of `fp8_grouped_linear`: see `ops._linear_triton`."""

from __future__ import annotations

import torch

from .._linear_triton import linear, refusal
from . import fp8_grouped_linear

__all__ = ["fp8_grouped_linear_triton"]


def _accepts(w: torch.Tensor, scale: torch.Tensor) -> str | None:
    return refusal(w, scale)


@fp8_grouped_linear.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def fp8_grouped_linear_triton(o: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`linear` as it is: the groups are a grid dimension."""
    return linear("fp8_grouped_linear", o, w, scale, torch.bfloat16)
