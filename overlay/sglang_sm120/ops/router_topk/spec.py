"""The model's call of `router_topk`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

from ...spec import Calls, Inputs, Spec, nbytes


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    experts = c["n_routed_experts"]
    logits = {"router_logits": make.normal(rows, experts), "correction_bias": make.normal(experts)}
    yield "gate", {**logits, "k": c["num_experts_per_tok"], "renormalize": c["norm_topk_prob"]}


SPEC = Spec(
    calls=_calls,
    traffic=lambda a: (nbytes(*a.values()), 0),
    served=True,
    prefill="Triton",
)
