"""Linear layer with FP8 block weights."""

from __future__ import annotations

import torch

from ...formats import fp8_block
from ...registry import Arguments, Op
from .._math import linear_refusal, rms_norm


@Op
def fp8_linear(
    x: torch.Tensor,
    w: torch.Tensor,
    scale: torch.Tensor,
    norm_weight: torch.Tensor | None = None,
    eps: float = 0.0,
) -> torch.Tensor:
    """y = x wᵀ with w dequantised exactly, fp32 sums, y rounded once to bf16.

    x bf16 [..., K], w float8_e4m3fn [N, K], scale fp32 or float8_e8m0fnu [ceil(N/128), ceil(K/128)] as in
    `formats.fp8_block`. Activations are not quantised. Returns bf16 [..., N].

    With norm_weight bf16 [K], x is normalised first: x / sqrt(mean(x²) + eps) * norm_weight in fp32, rounded to bf16.
    """
    return (normed(x, norm_weight, eps).float() @ fp8_block.dequantise(w, scale).T).bfloat16()


def normed(x: torch.Tensor, norm_weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """x bf16 as it meets the weight."""
    if norm_weight is not None:
        x = rms_norm(x, norm_weight, eps).bfloat16()
    return x


@fp8_linear.checked
def _check(a: Arguments) -> str | None:
    if a.norm_weight is not None and a.norm_weight.shape != a.w.shape[-1:]:
        return f"norm_weight is {list(a.norm_weight.shape)} and needs {[a.w.shape[-1]]} for weight {list(a.w.shape)}."
    return linear_refusal(a.x, a.w) or fp8_block.refusal(a.w, a.scale)
