"""Block-diagonal linear layer with FP8 block weights (the first half of the attention output projection)."""

from __future__ import annotations

import torch

from ...formats import fp8_block
from ...registry import Arguments, Op
from .._math import linear_refusal


@Op
def fp8_grouped_linear(o: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """y[:, g] = o[:, g] w[g]ᵀ for every group g, fp32 sums, rounded once to bf16.

    o bf16 [T, G, K] (any strides), w float8_e4m3fn [G, N, K], scale fp32 or float8_e8m0fnu
    [G, ceil(N/128), ceil(K/128)]. Returns bf16 [T, G, N].
    """
    groups = (o[:, g].float() @ fp8_block.dequantise(w[g], scale[g]).T for g in range(w.shape[0]))
    return torch.stack([y.bfloat16() for y in groups], dim=1)


@fp8_grouped_linear.checked
def _check(a: Arguments) -> str | None:
    return linear_refusal(a.o, a.w) or fp8_block.refusal(a.w, a.scale)
