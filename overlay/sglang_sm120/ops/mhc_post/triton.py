"""Triton provider of `mhc_post`: see `ops._mhc_triton`."""

from __future__ import annotations

import torch

from .._mhc_triton import contiguous, exit_block
from . import mhc_post

__all__ = ["mhc_post_triton"]


def _accepts(f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> str | None:
    return contiguous(f=f, x=x, post=post, comb=comb)


@mhc_post.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def mhc_post_triton(f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """One launch, each tensor read or written once."""
    return exit_block(f, x, post, comb)
