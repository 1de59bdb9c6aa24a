"""The sampler's call of `sample_token`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

from ...spec import Calls, Inputs, Spec, nbytes


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    logits, temperature = make.normal(rows, c["vocab_size"], scale=4.0), make.normal(rows, 1).abs() + 0.1
    yield "sampler", {"logits": logits, "temperature": temperature, "noise": make.normal(*logits.shape).square()}


SPEC = Spec(
    calls=_calls,
    traffic=lambda a: (nbytes(*a.values()), 0),
    served=True,
    exact=True,
    prefill="softmax and argmax",
)
