"""A token a row, drawn from the softmax of its logits without one."""

from __future__ import annotations

import torch

from ...registry import Arguments, Op

LEAST = torch.finfo(torch.float32).tiny
"""Exponential noise of zero counts as this much, as in SGLang's sampler."""


@Op
def sample_token(logits: torch.Tensor, temperature: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """argmax(logits / temperature - ln noise) of each row; with exponential noise a draw from its softmax.

    logits fp32 [T, V], -inf where masked; temperature fp32 [B, 1], above zero, of B requests with T / B rows each;
    noise fp32 [T, V], not negative. Returns int32 [T], of equal ones the first; NaN ranks lowest. Source: the
    Gumbel-max trick, as SGLang's `sampling_from_probs_torch` has it after a softmax: argmax(softmax(logits /
    temperature) / noise).
    """
    temperature = temperature.repeat_interleave(logits.shape[0] // temperature.shape[0], 0)
    scores = logits / temperature - noise.clamp_min(LEAST).log()
    return scores.masked_fill(scores.isnan(), -torch.inf).argmax(-1).to(torch.int32)


@sample_token.checked
def _check(a: Arguments) -> str | None:
    rows, vocabulary = a.logits.shape
    requests = a.temperature.numel()
    fits = requests and rows % requests == 0 and a.temperature.shape == (requests, 1)
    if not vocabulary or not fits or a.noise.shape != a.logits.shape:
        found = [list(tensor.shape) for tensor in (a.logits, a.temperature, a.noise)]
        return (
            f"logits, temperature and noise are {found} and need [T, V], [B, 1] and [T, V], V at least 1, "
            "T a multiple of B."
        )
    return None
