"""The memory model against SGLang's own arithmetic, its log lines on a GPU host, and the overlay's kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_sm120_launch import memory
from sglang_sm120_launch.model import Model, _from_config

GIB = 1 << 30


@pytest.fixture(scope="session")
def six_layers(config: dict[str, Any]) -> Model:
    """The full-width checkpoint that SGLang loaded on an H200: what its log said there is what the numbers must be."""
    small = {**config, "num_hidden_layers": 6, "compress_ratios": [0, 0, 4, 128, 4, 128, 0]}
    small |= {"n_routed_experts": 16, "vocab_size": 4096}
    return Model("six layers", small, _from_config(small, "six layers"), "config.json")


def test_pools_are_those_of_the_log(six_layers: Model):
    """`DSV4 memory calculation: bytes_per_full_token=1723.12, available_bytes=66.94 GB, full_token=41710592`."""
    token = sum(memory.bytes_per_full_token(six_layers.config, 0.1, False).values())
    assert token == pytest.approx(1723.12, abs=0.01)
    tokens = int(66.94 * GIB / token)
    assert tokens == pytest.approx(41710592, rel=0.001)  # available_bytes has two decimals
    sizes = memory.pool_sizes(six_layers.config, 41710592, 0.1, False)
    assert vars(sizes) == {
        "full": 41710592, "swa": 4171008, "c4": 10427648, "c128": 325864, "c4_state": 260688, "c128_state": 4171008,
    }  # fmt: skip


def test_allocations_are_those_of_the_log(six_layers: Model):
    """Free memory went from 136.53 to 70.32 GiB between `Load weight end` and `Memory pool end`."""
    sizes = memory.pool_sizes(six_layers.config, 41710592, 0.1, False)
    pools = sum(memory.pool_bytes(six_layers.config, sizes, False).values())
    tables = memory.bookkeeping(sizes, requests=256, context=1048576, draft_tokens=0)
    assert (pools + tables) / GIB == pytest.approx(136.53 - 70.32, rel=0.005)


def test_weights_are_those_of_the_log(six_layers: Model):
    """`Load weight end. … mem usage=2.59 GB`, with the overlay forced on."""
    assert sum(memory.weights(six_layers, 1, overlay=True).values()) / GIB == pytest.approx(2.59, rel=0.01)


def test_all_layers_are_those_of_the_log(config: dict[str, Any]):
    """43 layers with 128 experts on the same H200: `mem usage=77.23 GB`, `available_bytes=34.04 GB,
    full_token=2290432`, and free memory from 61.88 to 27.72 GiB for 32 requests of 17,408 tokens."""
    cut = {**config, "n_routed_experts": 128}
    model = Model("43 layers", cut, _from_config(cut, "43 layers"), "config.json")
    assert sum(memory.weights(model, 1, overlay=True).values()) / GIB == pytest.approx(77.23, rel=0.01)
    assert sum(memory.bytes_per_full_token(cut, 0.1, False).values()) == pytest.approx(15955.85, abs=0.01)
    sizes = memory.pool_sizes(cut, 2290432, 0.1, False)
    assert vars(sizes) == {
        "full": 2290432, "swa": 228864, "c4": 572608, "c128": 17894, "c4_state": 14304, "c128_state": 228864,
    }  # fmt: skip
    taken = sum(memory.pool_bytes(cut, sizes, False).values()) + memory.bookkeeping(sizes, 32, 17408, 0)
    assert taken / GIB == pytest.approx(61.88 - 27.72, rel=0.005)


@settings(deadline=None)  # the first example imports SGLang
@given(
    ratios=st.lists(st.sampled_from((0, 4, 128)), min_size=1, max_size=60),
    tokens=st.integers(min_value=1, max_value=1 << 26),
    window=st.sampled_from((0.05, 0.1, 0.4, 1.0)),
    mtp=st.booleans(),
)
def test_arithmetic_is_sglangs(ratios: list[int], tokens: int, window: float, mtp: bool):
    """Every size equals what the installed `DSV4PoolConfigurator` computes."""
    from sglang.srt.model_executor.pool_configurator import DSV4PoolConfigurator

    config = {
        "compress_ratios": [*ratios, 0], "num_hidden_layers": len(ratios), "qk_rope_head_dim": 64,
        "head_dim": 512, "index_head_dim": 128, "sliding_window": 128,
    }  # fmt: skip
    model = SimpleNamespace(
        qk_nope_head_dim=448, qk_rope_head_dim=64, index_head_dim=128, window_size=128,
        compress_ratios=config["compress_ratios"],
    )  # fmt: skip
    arguments = SimpleNamespace(swa_full_tokens_ratio=window, speculative_algorithm="EAGLE" if mtp else None)
    theirs = DSV4PoolConfigurator(SimpleNamespace(model_config=model, server_args=arguments, enable_hisparse=False))
    ours = sum(memory.bytes_per_full_token(config, window, mtp).values())
    assert ours == pytest.approx(theirs.bytes_per_full_token, rel=1e-12)
    sizes = theirs._compute_dsv4_sizes(tokens, memory.PAGE)
    short = (name.replace("_max_total_num_tokens", "").replace("_pool_size", "") for name in vars(sizes))
    expected = dict(zip(short, vars(sizes).values(), strict=True))
    assert vars(memory.pool_sizes(config, tokens, window, mtp)) == expected


def test_ranks_share_what_is_sharded(flash: Model):
    """Experts divide exactly; what is replicated does not; nothing is lost between the two."""
    whole, half = (memory.weights(flash, tp, overlay=True) for tp in (1, 2))
    assert half["experts"] * 2 == whole["experts"]
    assert whole["other weights"] / 2 < half["other weights"] < whole["other weights"]
    assert half["rotation tables"] == whole["rotation tables"] == 2 * 1048576 * 32 * 8


def test_upstream_widens_the_experts_scales(flash: Model):
    """One byte becomes four: 12.1 GiB more on each of two cards (43 layers x 256 experts x 25.2 M values / 32)."""
    ours, theirs = (memory.weights(flash, 2, overlay)["experts"] for overlay in (True, False))
    assert theirs - ours == 3 * 43 * 256 * (3 * 4096 * 2048 // 32) // 2


def test_the_mtp_layer_is_counted_apart(flash: Model):
    """The target leaves it out; the draft worker has it and, while it loads, its own embedding and head."""
    draft = memory.weights(flash, 2, overlay=True, mtp=True)
    target = memory.weights(flash, 2, overlay=True)
    assert draft["experts"] * 43 == target["experts"]
    assert draft["rotation tables"] == 0
    assert draft["other weights"] > 129280 * 4096 * 2


@pytest.mark.parametrize("tp", (1, 2, 8))
def test_scratch_holds_what_the_kernels_take(config: dict[str, Any], tp: int):
    """A rehearsal on meta tensors counts it: graphs keep theirs on each of four streams, a prefill takes its own."""

    def taken(rows: int, context: int) -> int:
        total = 0
        for name, op in registry.ops().items():
            provider = op.providers.get("triton")
            rehearsal = kernels.Rehearsal(lambda *_: None)
            for call in model_calls(config, tp, rows, context, op=name) if provider else ():
                with kernels.rehearse(rehearsal):
                    if provider.accepts is None or provider.accepts(**call.arguments) is None:
                        provider.function(**call.arguments)
            total += sum(rehearsal.scratch.values())
        return total

    from sglang_sm120 import kernels, ops, registry
    from sglang_sm120.model_calls import model_calls

    assert ops.__all__
    graphs = max(taken(rows, 1 << 20) for rows in (1, 16, 64))
    prefill = max(taken(4096, 1 << 17), taken(8192, 1 << 20))
    assert 0 < 4 * graphs + prefill <= memory.SCRATCH
