"""Exit of one block and entry of the next in one op."""

from __future__ import annotations

import torch

from ...registry import Op
from ..mhc_post import mhc_post
from ..mhc_pre import mhc_pre


@Op
def mhc_post_pre(
    f: torch.Tensor,
    x: torch.Tensor,
    post: torch.Tensor,
    comb: torch.Tensor,
    fn: torch.Tensor,
    scale: torch.Tensor,
    base: torch.Tensor,
    *,
    iters: int = 20,
    rms_eps: float = 1e-6,
    hc_eps: float = 1e-6,
    norm_weight: torch.Tensor | None = None,
    norm_eps: float = 1e-6,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`mhc_post(f, x, post, comb)`, then `mhc_pre` of its bf16 result with fn, scale and base of the next
    block.

    Shapes and dtypes as in the two ops. Returns (X' bf16 [T, 4, H], y bf16 [T, H], post' fp32 [T, 4],
    comb' fp32 [T, 4, 4]).
    """
    x = mhc_post.reference(f, x, post, comb)
    y, post, comb = mhc_pre.reference(
        x,
        fn,
        scale,
        base,
        iters=iters,
        rms_eps=rms_eps,
        hc_eps=hc_eps,
        norm_weight=norm_weight,
        norm_eps=norm_eps,
    )
    return x, y, post, comb
