"""SGLang's own pool with the package's clearing in it, beside SGLang's kernels a layer, and where these clear."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sglang.srt.mem_cache import deepseek_v4_memory_pool
from sglang.srt.mem_cache.deepseek_v4_compress_state import KVAndScore
from sglang.srt.mem_cache.deepseek_v4_memory_pool import DeepSeekV4TokenToKVPool
from torch import Tensor

from sglang_sm120 import ops, registry
from sglang_sm120.formats.compress_plan import CompressPlan
from sglang_sm120.limits import MAX_DRAFT_TOKENS
from sglang_sm120.ops.clear_draft_states import Layers
from sglang_sm120.step import draft_states

CPU = torch.device("cpu")
RING, RINGS, LAYERS, NODES = 16, 6, 3, 5


def pool_of(states: list[Tensor], ratios: tuple[int | None, ...], rings: tuple[int, ...] = ()) -> Any:
    """SGLang's pool, with nothing in it but the compressors' states of a layer for each ratio."""
    pool = DeepSeekV4TokenToKVPool.__new__(DeepSeekV4TokenToKVPool)
    sizes = rings or (RING,) * len(ratios)
    pool.compress_state_pools = [
        ratio and SimpleNamespace(ratio=ratio, ring_size=size, kv_score_buffer=KVAndScore(state))
        for ratio, size, state in zip(ratios, sizes, states, strict=True)
    ]
    return pool


def poisoned(seed: int, layers: int = 2 + LAYERS) -> list[Tensor]:
    """States of so many layers, a part of them NaN."""
    g = torch.Generator().manual_seed(seed)
    states = torch.randn(layers, RINGS * RING + 1, 12, generator=g)
    states[torch.rand(states.shape, generator=g) < 0.2] = torch.nan
    return list(states)


def bytes_of(states: list[Tensor]) -> list[bytes]:
    return [state.numpy().tobytes() for state in states]


class Clears:
    """Counts the launches of both: one of ours clears every layer, one of SGLang's one."""

    def __init__(self, patch: pytest.MonkeyPatch, provider: str) -> None:
        self.ours = self.theirs = 0
        self.tables: list[Tensor] = []
        theirs = deepseek_v4_memory_pool.clear_unaccepted_c128_draft_states

        def ours(layers: Layers, *arguments: Any) -> None:
            self.ours += 1
            self.tables.append(layers.addresses)
            op.by(provider, layers, *arguments)

        def counted(*arguments: Any, **options: Any) -> None:
            self.theirs += 1
            theirs(*arguments, **options)

        op = registry.ops()["clear_draft_states"]
        patch.setattr(draft_states, "_devices", set())
        patch.setattr(ops, "clear_draft_states", ours)
        patch.setattr(deepseek_v4_memory_pool, "clear_unaccepted_c128_draft_states", counted)


@pytest.mark.parametrize("provider", ["torch", "triton"])
def test_all_layers_are_cleared_as_by_sglangs_kernel(provider: str) -> None:
    ratios = (None, 4, 128, 128, 128)

    @settings(max_examples=10)
    @given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(2, RING))
    def held(seed: int, batch: int, nodes: int) -> None:
        g = torch.Generator().manual_seed(seed)
        given = (
            torch.randperm(RINGS, generator=g)[:batch],
            torch.randint(70, (batch,), generator=g),
            torch.randint(1, nodes + 1, (batch,), generator=g).int(),
            nodes,
        )
        ours, theirs, before = poisoned(seed), poisoned(seed), poisoned(seed)
        with pytest.MonkeyPatch.context() as patch:
            clears = Clears(patch, provider)
            pool_of(theirs, ratios).clear_unaccepted_c128_draft_states(*given)
            assert (clears.ours, clears.theirs) == (0, LAYERS)
            draft_states.serve(CPU)
            pool_of(ours, ratios).clear_unaccepted_c128_draft_states(*given)
            assert (clears.ours, clears.theirs) == (1, LAYERS)
        assert bytes_of(ours) == bytes_of(theirs)
        changed = [a != b for a, b in zip(bytes_of(ours), bytes_of(before), strict=True)]
        assert changed == [False, False] + [bool((given[2] < nodes).any())] * LAYERS

    held()


VERIFIED = (torch.tensor([4, 1]), torch.tensor([7, 30]), torch.tensor([1, 3]).int(), NODES)


def test_the_table_is_made_once_for_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    clears = Clears(monkeypatch, "triton")
    draft_states.serve(CPU)
    pools = [pool_of(poisoned(seed, 2), (128, 128)) for seed in (0, 1)]
    for pool in (*pools, *pools):
        pool.clear_unaccepted_c128_draft_states(*VERIFIED)
    first, second, again, second_again = clears.tables
    assert first is again and second is second_again
    assert second.tolist() == [layer.kv_score_buffer.kv_score.data_ptr() for layer in pools[1].compress_state_pools]
    assert clears.theirs == 0


def test_a_pool_without_such_layers_is_left_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    clears = Clears(monkeypatch, "torch")
    draft_states.serve(CPU)
    for _ in range(2):
        pool = pool_of(poisoned(0, 2), (None, 4))
        pool.clear_unaccepted_c128_draft_states(*VERIFIED)
    assert (clears.ours, clears.theirs) == (0, 0)


def test_another_devices_pool_is_left_to_sglang(monkeypatch: pytest.MonkeyPatch) -> None:
    clears = Clears(monkeypatch, "torch")
    draft_states.serve(torch.device("cuda", 0))
    pool_of(poisoned(0, 2), (128, 128)).clear_unaccepted_c128_draft_states(*VERIFIED)
    assert (clears.ours, clears.theirs) == (0, 2)


def test_nothing_is_asked_where_nothing_can_be_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clears = Clears(monkeypatch, "torch")
    draft_states.serve(CPU)
    pool = pool_of(poisoned(0, 2), (128, 128))
    pool.clear_unaccepted_c128_draft_states(*VERIFIED[:3], 1)
    pool.clear_unaccepted_c128_draft_states(*(tensor[:0] for tensor in VERIFIED[:3]), NODES)
    assert (clears.ours, clears.theirs) == (0, 0)


def test_rings_of_several_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    Clears(monkeypatch, "torch")
    draft_states.serve(CPU)
    pool = pool_of(poisoned(0, 2), (128, 128), (16, 32))
    with pytest.raises(ValueError, match=r"^The rings of ratio 128 have 16, 32 slots and need equally many\.$"):
        pool.clear_unaccepted_c128_draft_states(*VERIFIED)


@pytest.mark.parametrize("is_ragged", [False, True], ids=["uniform", "ragged"])
@pytest.mark.parametrize("most", [2, 6, MAX_DRAFT_TOKENS])
def test_what_was_refused_is_never_read(most: int, is_ragged: bool, seed: int) -> None:
    """SGLang's DSpark clears nothing: a verification reads of a ring what was committed before it, and nothing else.

    Refused states are NaN here; every entry whose block is committed has to be that of its tokens.
    """
    rng = torch.Generator().manual_seed(seed)
    ratio, ring, width, requests, length = 128, 256, 4, 3, 1500
    states = torch.full((requests * ring // ratio, ratio, 2 * width), torch.nan)
    rings = states.view(requests, ring, 2 * width)
    tokens = torch.randn(requests, length, 2 * width, generator=rng)
    ape = torch.randn(ratio, width, generator=rng)
    pages = torch.zeros(requests, length, dtype=torch.int32), torch.zeros(16, dtype=torch.int64)

    def up_to(most: int | Tensor, least: int = 1) -> Tensor:
        """Lengths least … most of each request."""
        return least + (torch.rand(requests, generator=rng) * (most - least + 1)).long()

    def run(done: Tensor, lengths: Tensor, rows: Tensor) -> tuple[CompressPlan, Tensor]:
        plans = ops.compress_prefill_plan.reference(
            ratio, torch.arange(requests), done + lengths, lengths, *pages, 256, ring
        )
        made = ops.compress.reference(states, rows, ape, plans, False, width, ratio)
        return CompressPlan.unpack(plans[0]), made

    done, checked = up_to(400), 0
    run(torch.zeros_like(done), done, torch.cat([row[:n] for row, n in zip(tokens, done, strict=True)]))
    while done.max() < length - most:
        lengths = up_to(most) if is_ragged else torch.full((requests,), most)
        taken = up_to(lengths)
        rows = [torch.randn(int(n), 2 * width, generator=rng) for n in lengths]
        for row, all_, begin, n in zip(rows, tokens, done, taken, strict=True):
            row[:n] = all_[begin : begin + n]
        plan, made = run(done, lengths, torch.cat(rows))
        owner = torch.arange(requests).repeat_interleave(lengths)
        for at in range(len(made)):
            request, end = int(owner[plan.ragged_id[at]]), int(plan.seq_len[at])
            if end <= done[request] + taken[request]:
                block = tokens[request, end - ratio : end]
                expected = ((block[:, width:] + ape).softmax(0) * block[:, :width]).sum(0)
                torch.testing.assert_close(made[at], expected)
                checked += 1
        for request in range(requests):
            begin = done[request]
            refused = torch.arange(begin + taken[request], begin + lengths[request]) % ring
            rings[request, refused] = torch.nan
        done += taken
    assert checked >= requests * (length - 400 - 2 * most) // ratio - requests
