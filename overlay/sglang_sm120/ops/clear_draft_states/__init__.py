"""What refused drafts left in the ratio-128 compressors' rings, out of their softmax: all layers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ...registry import Arguments, Op

ALIGNMENT = 16
"""Bytes that a thread stores at once."""


class Layers(NamedTuple):
    """The layers' states, alike in all but their place, and where they lie: made by `of`, once for a pool.

    states: fp32 [slots, 2 * half] each, values, then scores. addresses: int64 [layers], of their first bytes, on their
    device, multiples of ALIGNMENT.
    """

    states: tuple[torch.Tensor, ...]
    addresses: torch.Tensor

    @classmethod
    def of(cls, states: Sequence[torch.Tensor]) -> Layers:
        """At least one layer's states.

        Raises:
            ValueError: they differ in shape, dtype or device, or are not contiguous with rows of two halves and
                aligned.
        """
        first, places = states[0], [state.data_ptr() for state in states]
        for layer, state in enumerate(states):
            if state.dim() != 2 or state.shape[1] % 2 or not state.is_contiguous() or places[layer] % ALIGNMENT:
                raise ValueError(
                    f"The states of layer {layer} are {list(state.shape)} with strides {list(state.stride())} at "
                    f"{places[layer]}, and need contiguous [slots, 2 * half] at a multiple of {ALIGNMENT}."
                )
            found, needed = ((s.dtype, list(s.shape), s.device) for s in (state, first))
            if found != needed:
                raise ValueError(
                    f"The states of layer {layer} are {_said(*found)}, and need the first layer's {_said(*needed)}."
                )
        return cls(tuple(states), torch.tensor(places, dtype=torch.int64, device=first.device))


def _said(dtype: torch.dtype, shape: list[int], device: torch.device) -> str:
    return f"{dtype} {shape} on {device}"


@Op
def clear_draft_states(
    layers: Layers,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    accept_lens: torch.Tensor,
    ring_size: int,
    num_draft_tokens: int,
) -> None:
    """Value 0 and score -inf for each token of a verification that was refused, in every layer's states, in place.

    The token at offset j of request i lies in slot req_pool_indices[i] * ring_size + (seq_lens[i] + j) % ring_size; it
    is refused where accept_lens[i] <= j < num_draft_tokens. Nothing else is written, nor are the states read.

    req_pool_indices: int [B], different rings. seq_lens: int [B], tokens before the verification. accept_lens: int [B].
    Source: SGLang's `clear_unaccepted_c128_draft_states`, which does one layer.
    """
    offset = torch.arange(num_draft_tokens, device=seq_lens.device)
    slots = req_pool_indices.long()[:, None] * ring_size + (seq_lens.long()[:, None] + offset) % ring_size
    refused = slots[offset >= accept_lens[:, None]]
    for state in layers.states:
        values, scores = state.chunk(2, dim=1)
        values[refused], scores[refused] = 0.0, -torch.inf


@clear_draft_states.checked
def _check(a: Arguments) -> str | None:
    if not a.req_pool_indices.shape == a.seq_lens.shape == a.accept_lens.shape == (len(a.seq_lens),):
        found = [list(tensor.shape) for tensor in (a.req_pool_indices, a.seq_lens, a.accept_lens)]
        return f"req_pool_indices, seq_lens and accept_lens are {found} and need one [B]."
    if not 0 < a.num_draft_tokens <= a.ring_size:
        return f"num_draft_tokens is {a.num_draft_tokens} and needs 1 to the {a.ring_size} of ring_size."
    return None
