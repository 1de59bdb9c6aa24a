"""Hyper-connection exit of a block: the block's output back into four residual streams."""

from __future__ import annotations

import torch

from ...registry import Op


@Op
def mhc_post(f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """X'_k = post_k f + Σ_j comb[j, k] x_j, in fp32, rounded once.

    f bf16 [T, H] block output, x bf16 [T, 4, H] streams before the block, post fp32 [T, 4],
    comb fp32 [T, 4, 4] with the source stream first. Returns bf16 [T, 4, H].
    Source: the mHC equations of DeepSeek-V4; SGLang `models/deepseek_v4.py` `hc_post`.
    """
    mixed = comb.float().transpose(1, 2) @ x.float()
    return (post.float().unsqueeze(-1) * f.float().unsqueeze(1) + mixed).bfloat16()
