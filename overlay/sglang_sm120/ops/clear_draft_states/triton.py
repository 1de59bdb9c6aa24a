"""Triton provider of `clear_draft_states`: a program for a slot of a layer, which a table of addresses finds."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ... import kernels
from ...registry import Arguments
from .._pdl_triton import wait
from . import ALIGNMENT, clear_draft_states

_ALIGNMENT = tl.constexpr(ALIGNMENT)


@triton.jit(
    do_not_specialize=["ring_size"],
    do_not_specialize_on_alignment=["addresses", "req_pool_indices", "seq_lens", "accept_lens"],
)
def _clear(
    addresses, req_pool_indices, seq_lens, accept_lens, ring_size, HALF: tl.constexpr, LANES: tl.constexpr
):  # fmt: skip
    """Programs: requests x draft tokens x layers; states fp32 [slots, 2 * HALF] at each of `addresses`."""
    request, offset = tl.program_id(0), tl.program_id(1)
    wait()
    if offset >= tl.load(accept_lens + request):
        ring = tl.load(req_pool_indices + request).to(tl.int64) * ring_size
        slot = ring + (tl.load(seq_lens + request).to(tl.int64) + offset) % ring_size
        states = tl.load(addresses + tl.program_id(2)).to(tl.pointer_type(tl.float32))
        row = tl.multiple_of(states, _ALIGNMENT) + slot * (2 * HALF)
        lane = tl.arange(0, LANES)
        tl.store(row + lane, 0.0, mask=lane < HALF)
        tl.store(row + HALF + lane, -float("inf"), mask=lane < HALF)


def _accepts(a: Arguments) -> str | None:
    state = a.layers.states[0]
    if state.dtype != torch.float32:
        return f"the states are {state.dtype} and need torch.float32."
    if not (a.req_pool_indices.is_contiguous() and a.seq_lens.is_contiguous() and a.accept_lens.is_contiguous()):
        return "req_pool_indices, seq_lens and accept_lens need to be contiguous."
    return None


@clear_draft_states.provider("triton", runs_on="cpu sm90+", default_on="sm120 sm121", accepts=_accepts)
def clear_draft_states_triton(a: Arguments) -> None:
    """Contract in `clear_draft_states`."""
    half = a.layers.states[0].shape[1] // 2
    kernels.launch(
        _clear, (len(a.seq_lens), a.num_draft_tokens, len(a.layers.states)), a.layers.addresses, a.req_pool_indices,
        a.seq_lens, a.accept_lens, a.ring_size, HALF=half, LANES=triton.next_power_of_2(half),
    )  # fmt: skip
