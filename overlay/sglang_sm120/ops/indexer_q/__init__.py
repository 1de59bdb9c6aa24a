"""Indexer queries: RoPE, Hadamard rotation and FP8."""

from __future__ import annotations

import torch

from ...formats import indexer_page
from ...registry import Op
from .._math import hadamard, rotate_tail


@Op
def indexer_q(
    q: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: float,
    freqs_cis: torch.Tensor,
    positions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise q bf16 [T, h, 128] and fold its scale into the head weights bf16 [T, h].

    RoPE on the last 64 channels (freqs_cis complex64 [S, 32], positions int [T]), Hadamard times 128 ** -0.5,
    then FP8 with scale max(1e-4, largest magnitude) / 448 per token and head; fp32 up to there.

    Returns (q float8_e4m3fn [T, h, 128], weight · weight_scale · scale fp32 [T, h, 1]).
    """
    values, scale = indexer_page.quantise(hadamard(rotate_tail(q, freqs_cis, positions)))
    return values, (weight.float() * weight_scale * scale).unsqueeze(-1)
