"""Per-head normalisation and RoPE of the queries."""

from __future__ import annotations

import torch

from ...registry import Op
from .._math import rms_norm, rotate_tail

__all__ = ["q_norm_rope"]


@Op
def q_norm_rope(
    q: torch.Tensor,
    eps: float,
    freqs_cis: torch.Tensor,
    positions: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """RMS norm without weight over each head of q bf16 [T, h, 512], RoPE on its last 64 channels, rounded
    once.

    freqs_cis complex64 [S, 32], interleaved pairs; positions int [T]. Writes to out bf16 [T, h, 512] (any
    strides) if given, and returns it. The CUDA kernel `main_norm_rope.cuh` of SGLang also rounds between norm
    and RoPE.
    """
    result = rotate_tail(rms_norm(q, None, eps), freqs_cis, positions).to(q.dtype)
    return result if out is None else out.copy_(result)
