"""Linear layer with FP8 block weights."""

from __future__ import annotations

import torch

from ...formats import fp8_block
from ...registry import Op

__all__ = ["fp8_linear"]


@Op
def fp8_linear(x: torch.Tensor, w: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """y = x wᵀ with w dequantised exactly, fp32 sums, y rounded once to bf16.

    x bf16 [..., K], w float8_e4m3fn [N, K], scale fp32 or float8_e8m0fnu [ceil(N/128), ceil(K/128)] as in
    `formats.fp8_block`. Activations are not quantised. Returns bf16 [..., N].
    """
    return (x.float() @ fp8_block.dequantise(w, scale).T).bfloat16()
