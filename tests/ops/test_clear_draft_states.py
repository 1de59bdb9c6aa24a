"""`clear_draft_states` whatever the numbers are, what it refuses, and how the tools judge it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.common import Maker
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_sm120 import ops
from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.ops.clear_draft_states import Layers


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.integers(0, 6), st.integers(1, 12), st.integers(0, 8), st.integers(1, 9))
def test_refused_drafts_alone_are_cleared(seed: int, batch: int, nodes: int, more: int, half: int) -> None:
    """Each slot that a verification wrote is cleared or as it was to the bit, NaN too, and every other as it was."""
    make, ring = Maker(seed, torch.device("cpu")), nodes + more
    before = make.integers(-(2**31), 2**31, 2, 7 * ring, 2 * half, dtype=torch.int64).int().view(torch.float32)
    rings, lengths = make.choice(7, batch), make.integers(0, 10**6, batch)
    kept = make.integers(1, nodes + 1, batch)
    clear = torch.zeros(7 * ring, dtype=torch.bool)
    for of_ring, length, first in zip(rings.tolist(), lengths.tolist(), kept.tolist(), strict=True):
        offset = (torch.arange(ring) - length) % ring
        clear.view(7, ring)[of_ring] = (first <= offset) & (offset < nodes)
    for provider in ops.clear_draft_states.providers:
        layers = Layers.of([layer.clone() for layer in before])
        for _ in range(2):
            ops.clear_draft_states.by(provider, layers, rings, lengths, kept, ring, nodes)
        for layer, states in zip(before, layers.states, strict=True):
            assert torch.equal(states[~clear].view(torch.int32), layer[~clear].view(torch.int32))
            assert not states[clear, :half].any() and states[clear, half:].isneginf().all()


STATES = [torch.zeros(32, 8) for _ in range(3)]


@pytest.mark.parametrize(
    ("other", "why"),
    [
        (torch.zeros(32, 12), r"are torch.float32 \[32, 12\] on cpu, and need the first layer's .* \[32, 8\]"),
        (torch.zeros(48, 8), r"are torch.float32 \[48, 8\] on cpu, and need the first layer's .* \[32, 8\]"),
        (torch.zeros(32, 8).bfloat16(), r"are torch.bfloat16 .* and need the first layer's torch.float32"),
        (torch.zeros(32, 8, device="meta"), "on meta, and need the first layer's .* on cpu"),
        (torch.zeros(32, 16)[:, ::2], r"with strides \[16, 2\] at .* need contiguous"),
        (torch.zeros(32, 4, 2), r"are \[32, 4, 2\] with .* need contiguous \[slots, 2 \* half\]"),
        (torch.zeros(32, 7), r"are \[32, 7\] with .* need contiguous \[slots, 2 \* half\]"),
        (torch.zeros(257)[1:].view(32, 8), "and need contiguous .* at a multiple of 16"),
    ],
)
def test_layers_whose_states_differ_are_refused(other: torch.Tensor, why: str) -> None:
    with pytest.raises(ValueError, match=f"^The states of layer 2 .*{why}"):
        Layers.of([*STATES[:2], other])


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"seq_lens": torch.zeros(3).long()}, r"are \[\[2\], \[3\], \[2\]\] and need one \[B\]"),
        ({"accept_lens": torch.zeros(2, 1).int()}, r"are \[\[2\], \[2\], \[2, 1\]\] and need one \[B\]"),
        ({"num_draft_tokens": 17}, "num_draft_tokens is 17 and needs 1 to the 16"),
        ({"num_draft_tokens": 0}, "num_draft_tokens is 0 and needs 1 to the 16"),
    ],
)
def test_another_verification_is_refused(wrong: dict[str, Any], why: str) -> None:
    lens = torch.ones(2).int()
    given = {"req_pool_indices": torch.tensor([1, 0]), "seq_lens": lens, "accept_lens": lens, "ring_size": 16}
    for provider in ops.clear_draft_states.providers:
        with pytest.raises(ValueError, match=f"^clear_draft_states: .*{why}"):
            ops.clear_draft_states.by(provider, **{"layers": Layers.of(STATES), **given, "num_draft_tokens": 4} | wrong)


def test_the_kernel_takes_fp32_and_lengths_side_by_side() -> None:
    lens = torch.ones(2).int()
    halves, apart = Layers.of([STATES[0].bfloat16()]), torch.ones(4).int()[::2]
    refusal = ops.clear_draft_states.refusal
    assert "torch.bfloat16" in (refusal("triton", halves, lens, lens, lens, 16, 4) or "")
    assert "contiguous" in (refusal("triton", Layers.of(STATES), lens, apart, lens, 16, 4) or "")
    assert refusal("triton", Layers.of(STATES), lens, lens, lens, 16, 4) is None


def test_cleared_slots_are_judged_by_the_lengths() -> None:
    """On a GPU, where states are compared with nothing that was before them."""
    problem = ops.SPECS["clear_draft_states"].problem
    assert problem is not None
    wrong = ((3, (100, slice(512, 1024)), -torch.inf), (19, None, 1.0), (0, None, torch.nan), (7, None, -1.0))
    for layer, place, value in ((0, (0, 0), 0.0), *wrong):
        (call,) = ops.calls("clear_draft_states", model_config(), 1, 8, 4096, "cpu", 1)
        assert problem(call.arguments) is not None
        ops.clear_draft_states.by("triton", **call.arguments)
        assert problem(call.arguments) is None
        states = call.arguments["layers"].states[layer]
        cleared = int(states.isneginf().any(1).nonzero()[0])
        states[place or (cleared, 5)] = value
        if place != (0, 0):
            assert problem(call.arguments) == f"layer {layer} has other slots cleared than those of refused tokens"
