"""A token a row, drawn from the softmax of its logits without one."""

from __future__ import annotations

import torch

from ...registry import Op

LEAST = torch.finfo(torch.float32).tiny
"""Exponential noise of zero counts as this much, as in SGLang's sampler."""


@Op
def sample_token(logits: torch.Tensor, temperature: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """argmax(logits / temperature - ln noise) of each row; with exponential noise a draw from its softmax.

    logits fp32 [T, V], any of them -inf; temperature fp32 [T, 1], above zero; noise fp32 [T, V], not negative. Returns
    int32 [T], of equal ones the first. Source: the Gumbel-max trick, as SGLang's `sampling_from_probs_torch` has it
    after a softmax: argmax(softmax(logits / temperature) / noise).
    """
    return torch.argmax(logits / temperature - noise.clamp_min(LEAST).log(), dim=-1).to(torch.int32)
