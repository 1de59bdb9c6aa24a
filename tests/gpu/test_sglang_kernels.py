"""SGLang's kernels as providers: each call gives to each parameter of SGLang's function what belongs there.

A run on a GPU holds their results against the torch references, in `tests/ops/test_parity.py`.
"""

from __future__ import annotations

from importlib import import_module

import pytest
from foreign import bind, calls, functions

from sglang_sm120 import ops, registry

pytestmark = pytest.mark.needs_no_gpu
MODULES = [
    import_module(f"sglang_sm120.ops.{name}.sglang") for name in ops.SPECS if "sglang" in registry.ops()[name].providers
]
FUNCTIONS = {name: function for module in MODULES for name, function in functions(module).items()}
POSITIONS = {"eps": "eps", "freqs_cis": "freqs_cis", "positions": "positions"}
# Provider: what each parameter of the function that it calls gets.
GIVEN = {
    "k_norm_rope_store": {
        "kv": "kv", "kv_weight": "weight", "out_loc": "slots", "kvcache": "pages", "page_size": "page_size",
    } | POSITIONS,
    "indexer_q": {
        "q_input": "q", "weight": "weight", "weight_scale": "weight_scale", "freqs_cis": "freqs_cis",
        "positions": "positions",
    },
    "hash_topk": {"router_logits": "router_logits", "input_ids": "input_ids", "tid2eid": "tid2eid"},
    "silu_mul_clamp": {"input": "gate_up", "output": "out", "swiglu_limit": "limit"},
    "compress": {
        "kv_score_buffer": "kv_score_buffer", "kv_score_input": "kv_score_input", "ape": "ape",
        "plan": "sglangs_plan(ratio, plans, is_decode)", "compress_ratio": "ratio", "head_dim": "head_dim",
        "out": "out",
    },
    "compress_norm_rope_store": {
        "kv": "kv", "plan": "sglangs_plan(ratio, (plan,) if is_decode else (plan, plan), is_decode)",
        "norm_weight": "norm_weight", "norm_eps": "eps", "freq_cis": "freqs_cis", "out_loc": "out_slots",
        "kvcache": "pages", "page_size": "page_size",
    },
}  # fmt: skip


def given(function: str) -> list[dict[str, str]]:
    return [bind(dotted, call) for dotted, call in calls(FUNCTIONS[function])]


def test_each_provider_is_listed() -> None:
    assert set(GIVEN) == {name for name, op in registry.ops().items() if "sglang" in op.providers}


@pytest.mark.parametrize("op", GIVEN)
def test_each_parameter_gets_what_belongs_there(op: str) -> None:
    assert given(registry.ops()[op].providers["sglang"].function.__name__) == [GIVEN[op]]


def test_a_plan_is_sglangs() -> None:
    decode, prefill = given("sglangs_plan")
    assert decode == {"compress_ratio": "ratio", "plan_d": "*plans"}
    assert prefill == {"compress_ratio": "ratio", "plan_c": "*plans", "plan_w": "*plans"}
