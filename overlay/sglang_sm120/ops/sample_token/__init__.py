"""A token a row, drawn from the softmax of its logits without one."""

from __future__ import annotations

import torch

from ...registry import Arguments, Op

LEAST = torch.finfo(torch.float32).tiny
"""Exponential noise of zero counts as this much, as in SGLang's sampler."""


@Op
def sample_token(logits: torch.Tensor, temperature: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """argmax(logits / temperature - ln noise) of each row; with exponential noise a draw from its softmax.

    logits fp32 [T, V], -inf where masked; temperature fp32 [T, 1], above zero; noise fp32 [T, V], not negative. Returns
    int32 [T], of equal ones the first; NaN ranks lowest. Source: the Gumbel-max trick, as SGLang's
    `sampling_from_probs_torch` has it after a softmax: argmax(softmax(logits / temperature) / noise).
    """
    scores = logits / temperature - noise.clamp_min(LEAST).log()
    return scores.masked_fill(scores.isnan(), -torch.inf).argmax(-1).to(torch.int32)


@sample_token.checked
def _check(a: Arguments) -> str | None:
    rows, vocabulary = a.logits.shape
    if not vocabulary or a.temperature.shape != (rows, 1) or a.noise.shape != a.logits.shape:
        found = [list(tensor.shape) for tensor in (a.logits, a.temperature, a.noise)]
        return f"logits, temperature and noise are {found} and need [T, V], [T, 1] and [T, V], V at least 1."
    return None
