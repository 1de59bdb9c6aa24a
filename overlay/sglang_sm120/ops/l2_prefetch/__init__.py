"""Weights on their way into the L2 before their kernel asks for them."""

from __future__ import annotations

import torch

from ...registry import Arguments, Op


@Op
def l2_prefetch(first: torch.Tensor, second: torch.Tensor) -> None:
    """Changes nothing. A provider may have the GPU bring the beginnings of both, first before second, into its L2.

    first, second: weights of any shape and dtype, contiguous, which no kernel in flight writes. How much comes is a
    matter of the cache's size; nobody waits for it.
    """


@l2_prefetch.checked
def _check(a: Arguments) -> str | None:
    for name in ("first", "second"):
        if not getattr(a, name).is_contiguous():
            return f"{name} has strides {list(getattr(a, name).stride())} and needs to be contiguous."
    return None
