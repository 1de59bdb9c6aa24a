"""Other implementations of `sample_token`."""

from __future__ import annotations

from baselines import Arguments, Baseline, Run
from sglang_sm120.tolerance import EXACT


def _softmax(a: Arguments) -> Run:
    logits, noise = a["logits"], a["noise"]
    temperature = a["temperature"].repeat_interleave(len(logits) // len(a["temperature"]), 0)
    probabilities = logits.clone()

    def draw() -> object:
        # As SGLang's sampler has it, but for the noise, which is made before.
        probabilities.copy_(logits).div_(temperature)
        probabilities[:] = probabilities.softmax(-1)
        return (probabilities.float() / noise).argmax(-1, keepdim=True).view(-1).int()

    return draw


OTHERS = [
    Baseline("sglang_sampler", "division, softmax, copy, division, argmax", _softmax, EXACT),
]  # fmt: skip
