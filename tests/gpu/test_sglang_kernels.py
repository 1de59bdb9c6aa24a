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
POSITIONS = {"eps": "a.eps", "freqs_cis": "a.freqs_cis", "positions": "a.positions"}
# Provider: what each parameter of the function that it calls gets.
GIVEN = {
    "k_norm_rope_store": {
        "kv": "a.kv", "kv_weight": "a.weight", "out_loc": "a.slots", "kvcache": "a.pages", "page_size": "a.page_size",
    } | POSITIONS,
    "indexer_q": {
        "q_input": "a.q", "weight": "a.weight", "weight_scale": "a.weight_scale", "freqs_cis": "a.freqs_cis",
        "positions": "a.positions",
    },
    "hash_topk": {"router_logits": "a.router_logits", "input_ids": "a.input_ids", "tid2eid": "a.tid2eid"},
    "silu_mul_clamp": {"input": "a.gate_up", "output": "out", "swiglu_limit": "a.limit"},
    "compress": {
        "kv_score_buffer": "a.kv_score_buffer", "kv_score_input": "a.kv_score_input", "ape": "a.ape",
        "plan": "sglangs_plan(a.ratio, a.plans, a.is_decode)", "compress_ratio": "a.ratio", "head_dim": "a.head_dim",
        "out": "a.out",
    },
    "compress_norm_rope_store": {
        "kv": "a.kv", "plan": "sglangs_plan(a.ratio, (a.plan,) if a.is_decode else (a.plan, a.plan), a.is_decode)",
        "norm_weight": "a.norm_weight", "norm_eps": "a.eps", "freq_cis": "a.freqs_cis", "out_loc": "a.out_slots",
        "kvcache": "a.pages", "page_size": "a.page_size",
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
