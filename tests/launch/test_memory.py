"""The memory model against SGLang's own arithmetic and allocations, and the step's kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_sm120.checkpoint.config import FLASH, PRO, model_config
from sglang_sm120_launch import memory
from sglang_sm120_launch.fit import Room
from sglang_sm120_launch.model import Model

RATIOS = st.lists(st.sampled_from((0, 4, 128)), min_size=1, max_size=60)
REQUESTS = st.integers(min_value=1, max_value=300)
WINDOWS = st.sampled_from((0.05, 0.1, 0.4, 1.0))


def made(ratios: list[int]) -> dict[str, Any]:
    """The part of a config.json that sizes the cache; the last ratio is the MTP layer's."""
    return {
        "compress_ratios": [*ratios, 0], "num_hidden_layers": len(ratios), "qk_rope_head_dim": 64,
        "head_dim": 512, "index_head_dim": 128, "sliding_window": 128,
    }  # fmt: skip


@contextmanager
def serving(window: float, requests: int, draft: int) -> Iterator[None]:
    """SGLang's settings as a server with these flags has them, for its pools."""
    from sglang.srt.layers.attention.dsv4 import unified_kv_gate
    from sglang.srt.mem_cache import deepseek_v4_memory_pool, memory_pool
    from sglang.srt.model_executor import pool_configurator

    schedule = SimpleNamespace(
        _swa_full_tokens_ratio_explicitly_set=True, swa_full_tokens_ratio=window, max_running_requests=requests,
        swa_prefix_tails=None, chunked_prefill_size=4096, disable_overlap_schedule=False, page_size=memory.PAGE,
    )  # fmt: skip
    spec = SimpleNamespace(
        speculative_algorithm="EAGLE" if draft else None, speculative_num_draft_tokens=draft or None,
        speculative_num_steps=draft - 1, speculative_eagle_topk=1,
    )  # fmt: skip
    kernel = SimpleNamespace(dsv4_attn_backend="flashmla", enable_deepseek_v4_fp4_indexer=False)
    features = SimpleNamespace(enable_encoder_swa_bounded_replay=False, enable_memory_saver=False)
    bags = {
        "get_schedule": schedule,
        "get_spec": spec,
        "get_exec": SimpleNamespace(kernel=kernel, features=features),
        "get_memory": SimpleNamespace(enable_hisparse=False, disable_radix_cache=False),
        "get_disagg": SimpleNamespace(disaggregation_mode="null", disaggregation_decode_extra_slots=0),
        "max_speculative_num_draft_tokens": draft or None,
    }
    unified_kv_gate.is_unified_kv_triton.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        for module in (pool_configurator, deepseek_v4_memory_pool, memory_pool):
            for name, value in bags.items():
                if hasattr(module, name):
                    patch.setattr(module, name, lambda value=value: value)
        yield


def configurator(config: dict[str, Any]) -> Any:
    """SGLang's own, for a model of this config."""
    from sglang.srt.model_executor.pool_configurator import DSV4PoolConfigurator
    from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

    layers = config["num_hidden_layers"]
    model = SimpleNamespace(
        qk_nope_head_dim=448, qk_rope_head_dim=64, index_head_dim=128, window_size=128, context_len=1 << 20,
        compress_ratios=config["compress_ratios"], hf_config=SimpleNamespace(kv_source_layer_ids=[]),
    )  # fmt: skip
    return DSV4PoolConfigurator(
        SimpleNamespace(
            model_config=model,
            kv_cache_dtype_str="fp8_e4m3",
            spec_algorithm=SpeculativeAlgorithm.NONE,
            pp_size=1,
            layer_info=SimpleNamespace(start_layer=0, end_layer=layers),
            sliding_window_size=128,
            page_size=memory.PAGE,
            attn_dp_size=1,
        )  # fmt: skip
    )


def named(sizes: Any) -> dict[str, int]:
    """SGLang's pool sizes under the names of its log line."""
    return {name: getattr(sizes, f"{name}_max_total_num_tokens") for name in ("full", "swa", "c4", "c128")} | {
        name: getattr(sizes, f"{name}_pool_size") for name in ("c4_state", "c128_state")
    }


@given(
    ratios=RATIOS,
    available=st.integers(min_value=1 << 28, max_value=1 << 37),
    window=WINDOWS,
    requests=REQUESTS,
    draft=st.sampled_from((0, 2, 4, 10)),
)
def test_sizes_are_sglangs(ratios: list[int], available: int, window: float, requests: int, draft: int):
    """Every size equals what the installed `DSV4PoolConfigurator` makes of a budget, and of a number of tokens."""
    config, mtp = made(ratios), draft > 0
    with serving(window, requests, draft):
        theirs = configurator(config)
        ours = sum(memory.bytes_per_full_token(config, window, mtp).values())
        assert ours == pytest.approx(theirs.bytes_per_full_token, rel=1e-12)
        assert memory.request_state_bytes(config, requests, mtp) == theirs._get_c128_state_fixed_bytes(requests)
        tokens = memory.tokens_that_fit(config, available, window, requests, mtp)
        pools = memory.pool_sizes(config, tokens, window, requests, mtp)
        if pools.swa <= 128 + memory.PAGE:
            with pytest.raises(ValueError, match="cannot hold even one request"):
                theirs.calculate_pool_sizes(available, memory.PAGE)
            return
        sizes = theirs.calculate_pool_sizes(available, memory.PAGE)
        again = theirs.calculate_pool_sizes_from_max_tokens(tokens, memory.PAGE)
        for found in (sizes, again):
            found.max_running_requests = requests
            theirs.finalize_with_max_running_requests(found)
            assert vars(pools) == named(found)


@given(
    ratios=RATIOS,
    available=st.integers(min_value=1 << 28, max_value=1 << 37),
    window=WINDOWS,
    requests=REQUESTS,
    drafts=st.integers(0, 4),
    bound=st.integers(0, 1 << 20),
)
def test_pools_take_no_more_than_counted_and_padding(
    ratios: list[int], available: int, window: float, requests: int, drafts: int, bound: int
):
    """SGLang fills `available` with what it counts; on top come a dummy page and a ring of each layer, and windows of
    more drafting layers than it reserves for. `bound`: the padding of more tokens is enough too."""
    config = made(ratios)
    tokens = memory.tokens_that_fit(config, available, window, requests, drafts)
    pools = memory.pool_sizes(config, tokens, window, requests, drafts)
    taken = sum(memory.pool_bytes(config, pools, drafts).values())
    spent = max(available, memory.request_state_bytes(config, requests, drafts))
    assert taken <= spent + memory.pool_padding(config, tokens + bound, window, requests, drafts)


@given(
    ratios=RATIOS,
    tokens=st.integers(min_value=16, max_value=1 << 13),
    window=WINDOWS,
    requests=REQUESTS,
    draft=st.sampled_from((0, 4)),
)
def test_bytes_are_sglangs(ratios: list[int], tokens: int, window: float, requests: int, draft: int):
    """The bytes of every buffer that the installed `DeepSeekV4TokenToKVPool` allocates, the draft worker's included."""
    import torch
    from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool

    config, mtp = made(ratios), draft > 0
    pools = memory.pool_sizes(config, tokens * memory.PAGE, window, requests, mtp)
    ours = memory.pool_bytes(config, pools, mtp)

    def buffers(ratios: list[int]) -> dict[str, int]:
        pool = DeepSeekV4TokenToKVPool(
            max_num_reqs=requests, num_req_slots=requests + 1, swa_size=pools.swa, c4_size=pools.c4,
            c128_size=pools.c128, c4_state_pool_size=pools.c4_state, c128_state_pool_size=pools.c128_state,
            page_size=memory.PAGE, swa_page_size=memory.PAGE, dtype=torch.float8_e4m3fn, c4_state_dtype=torch.float32,
            c128_state_dtype=torch.float32, qk_nope_head_dim=448, qk_rope_head_dim=64, indexer_head_dim=128,
            layer_num=len(ratios), device="meta", enable_memory_saver=False, compression_ratios=ratios, start_layer=0,
            end_layer=len(ratios), online_mtp_max_draft_tokens=draft, full_size=pools.full,
        )  # fmt: skip
        states = dict.fromkeys(("c4 state", "c128 state", "indexer state"), 0)
        for state in filter(None, pool.compress_state_pools):
            states[f"c{state.ratio} state"] += state.kv_score_buffer.kv_score.nbytes
        for state in filter(None, pool.indexer_compress_state_pools):
            states["indexer state"] += state.kv_score_buffer.kv_score.nbytes
        paged = {"window": pool.swa_kv_pool, "c4": pool.c4_kv_pool, "c128": pool.c128_kv_pool}
        taken = {name: sum(page.nbytes for page in kv.kv_buffer) if kv else 0 for name, kv in paged.items()}
        index = pool.c4_indexer_kv_pool
        return states | taken | {"indexer": sum(b.nbytes for b in index.index_k_with_scale_buffer) if index else 0}

    with serving(window, requests, draft):
        theirs = buffers(ratios)
        if mtp:
            theirs["window"] += buffers([0])["window"]
    assert ours == theirs


@given(requests=REQUESTS, context=st.integers(1, 1 << 20), draft=st.sampled_from((0, 2, 4, 10)))
def test_tables_are_sglangs(requests: int, context: int, draft: int):
    """A row of positions for each request, and the map from the full pool to the window pool."""
    from sglang.srt.mem_cache import allocation_sizing
    from sglang.srt.mem_cache.memory_pool import ReqToTokenPool

    pools = memory.Pools(1 << 14, 1 << 12, 0, 0, 0, 0)
    parallel = SimpleNamespace(attn_dcp_size=1)
    with serving(0.1, requests, draft), pytest.MonkeyPatch.context() as patch:
        from sglang.srt.model_executor import pool_configurator

        for name in ("get_schedule", "get_spec", "max_speculative_num_draft_tokens"):
            patch.setattr(allocation_sizing, name, getattr(pool_configurator, name))
        patch.setattr(allocation_sizing, "get_parallel", lambda: parallel)
        row = context + allocation_sizing.get_req_to_token_extra_context_len()
    table = ReqToTokenPool(size=requests, max_context_len=row, device="meta", enable_memory_saver=False).req_to_token
    mapped = (pools.full + memory.PAGE + 1) * 8
    assert memory.bookkeeping(pools, requests, context, draft) == table.nbytes + mapped


def test_ranks_share_what_is_sharded(flash: Model):
    """Experts divide exactly; what is replicated does not; nothing is lost between the two."""
    whole, half = (memory.weights(flash, tp, "cuda") for tp in (1, 2))
    assert half["experts"] * 2 == whole["experts"]
    assert whole["other weights"] / 2 < half["other weights"] < whole["other weights"]
    assert half["rotation tables"] == whole["rotation tables"] == 2 * 1048576 * 32 * 8


def test_whole_experts_are_as_many_bytes_as_parts_of_all(pro: Model):
    """Of 384 each of 16 ranks has 24, and the shared one of each of 61 layers whole, with fp32 scales."""
    parts, whole = (memory.weights(pro, 16, "cuda", ep=ep) for ep in (1, 16))
    assert parts["experts"] == whole["experts"] == 61 * 24 * 3 * 7168 * 3072 * 17 // 32
    shared = 3 * 61 * (7168 * 3072 + 56 * 24 * 4)
    assert whole["other weights"] - parts["other weights"] == shared - shared // 16


def test_scales_are_widened_on_a_cpu_alone(flash: Model):
    """One byte becomes four (43 layers x 256 experts x 25.2 M values / 32)."""
    gpu, cpu = (memory.weights(flash, 2, device)["experts"] for device in ("cuda", "cpu"))
    assert cpu - gpu == 3 * 43 * 256 * (3 * 4096 * 2048 // 32) // 2


def test_the_step_has_no_experts_of_its_own(flash: Model):
    """On a CPU it turns SGLang's, layer by layer and in their place: what is new of one layer has room, no more."""
    import torch

    from sglang_sm120.formats import experts

    assert memory.step_weights(flash, 2, "cuda", mtp=False).keys() == {"wo_a FP8 (the step)"}
    room = memory.step_weights(flash, 2, "cpu", mtp=False)["one layer's experts (the step)"]
    assert room == memory.weights(flash, 2, "cuda")["experts"] // 43
    # One of the 256 experts, at half of Flash's 2,048 channels inside.
    hidden, inter = 4096, 1024
    kept = experts.Experts(
        torch.zeros(1, 2 * inter, hidden // 2, dtype=torch.uint8), torch.ones(1, 2 * inter, hidden // 32),
        torch.zeros(1, hidden, inter // 2, dtype=torch.uint8), torch.ones(1, hidden, inter // 32),
    )  # fmt: skip
    turned = experts.from_gate_first(*kept)
    new = sum(a.nbytes for a, b in zip(turned, kept, strict=True) if a.data_ptr() != b.data_ptr())
    assert turned.w2.data_ptr() == kept.w2.data_ptr()
    # Beside them scales that were turned, as fp32, for a moment.
    assert new + kept.s13.nbytes <= room // 256 == sum(tensor.nbytes for tensor in turned)


def test_wo_a_is_there_twice_where_sglang_is_as_released(flash: Model):
    """43 layers x 8,192 x 4,096: bf16 for SGLang's prefill and FP8 with fp32 scales for the step, 2.16 GB at TP 2."""
    values = 43 * 8192 * 4096
    for tp in (1, 2):
        bf16, fp8 = values * 2 // tp, (values + values // 128**2 * 4) // tp
        assert memory.weights(flash, tp, "cuda")[memory.WO_A] == bf16
        room = Room("a card", (), 0, tp, "decode", 0, patched=False)
        both, one = room.loaded(flash), replace(room, patched=True).loaded(flash)
        assert both[memory.WO_A] == bf16 and both["wo_a FP8 (the step)"] == one["wo_a FP8 (the step)"] == fp8
        assert memory.WO_A not in one and sum(both.values()) - sum(one.values()) == bf16
        assert replace(room, step="none", patched=True).loaded(flash)[memory.WO_A] == bf16


def test_the_mtp_layer_is_counted_apart(flash: Model):
    """The target leaves it out; the draft worker has it and, until the cache is sized, its own embedding and head."""
    draft = memory.weights(flash, 2, "cuda", mtp=True)
    target = memory.weights(flash, 2, "cuda")
    assert draft["experts"] * 43 == target["experts"]
    assert draft["rotation tables"] == 0
    assert draft["other weights"] > 129280 * 4096 * 2


@pytest.mark.parametrize(("model", "tp"), ((FLASH, 1), (FLASH, 2), (FLASH, 8), (PRO, 4), (PRO, 8)))
def test_scratch_holds_what_the_kernels_take(model: str, tp: int):
    """A rehearsal on meta tensors counts it: graphs keep theirs on each of four streams, a prefill takes its own."""

    def taken(rows: int, context: int) -> int:
        # One for all: an op takes the most of its calls, and those of experts share theirs.
        rehearsal = kernels.Rehearsal(lambda *_: None)
        for name, op in registry.ops().items():
            for call in ops.calls(name, model_config(model), tp, rows, context) if "triton" in op.providers else ():
                with kernels.rehearse(rehearsal):
                    if op.refusal("triton", **call.arguments) is None:
                        op.by("triton", **call.arguments)
        return sum(rehearsal.scratch.values())

    from sglang_sm120 import kernels, ops, registry

    graphs = max(taken(rows, 1 << 20) for rows in (1, 16, 64, 256))
    prefill = max(taken(4096, 1 << 17), taken(8192, 1 << 20))
    assert 0 < 4 * graphs + prefill <= memory.SCRATCH
