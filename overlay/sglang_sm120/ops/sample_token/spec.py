"""The sampler's call of `sample_token`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

import torch

from ...spec import Arguments, Calls, Inputs, Spec, nbytes
from . import LEAST

VERIFIED = 4
"""Tokens of a request that a verification has with 3 draft steps: they share its temperature."""


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    logits, temperature = make.normal(rows, c["vocab_size"], scale=4.0), make.normal(rows, 1).abs() + 0.1
    yield "sampler", {"logits": logits, "temperature": temperature, "noise": make.normal(*logits.shape).square()}
    if rows % VERIFIED == 0:
        noise = make.normal(*logits.shape).square()
        yield "verify", {"logits": logits, "temperature": temperature[: rows // VERIFIED], "noise": noise}


def _problem(a: Arguments, tokens: torch.Tensor) -> str | None:
    """Scores are rounded otherwise than the reference's: of two that are this near either may be the largest."""
    temperature = a["temperature"].repeat_interleave(len(a["logits"]) // len(a["temperature"]), 0)
    scores = a["logits"] / temperature - a["noise"].clamp_min(LEAST).log()
    if tokens.shape != scores.shape[:1] or not ((tokens >= 0) & (tokens < scores.shape[1])).all():
        return "a token is none of the vocabulary"
    behind = scores.amax(1) - scores.gather(1, tokens.long().unsqueeze(1)).squeeze(1)
    return "a token scores lower than another" if (behind > 1e-5 * scores.abs().amax(1)).any() else None


SPEC = Spec(
    calls=_calls,
    traffic=lambda a: (nbytes(*a.values()), 0),
    served=True,
    problem=_problem,
    prefill="softmax and argmax",
)
