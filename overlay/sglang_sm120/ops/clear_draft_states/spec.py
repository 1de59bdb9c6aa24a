"""The call of `clear_draft_states` after a verification, and what the tools know of it."""

from __future__ import annotations

from typing import Any

import torch

from ...limits import MAX_ROWS, RING
from ...spec import Arguments, Calls, Inputs, Spec, nbytes
from . import Layers, clear_draft_states

DRAFT_TOKENS = 4
"""As the launcher asks for, with three steps of drafts."""


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    # Rows of a verification, of which there are no larger ones.
    requests, ring, width = -(-min(rows, MAX_ROWS) // DRAFT_TOKENS), RING[128], 2 * c["head_dim"]
    layers = [make.normal(requests * ring, width) for ratio in c["compress_ratios"] if ratio == 128]
    if not layers:
        return
    arguments = {
        "layers": Layers.of(layers),
        "req_pool_indices": make.distinct(1, requests, requests)[0].long(),
        "seq_lens": make.integers(0, max(1, context), requests, dtype=torch.int64),
        "accept_lens": make.integers(1, DRAFT_TOKENS + 1, requests),
        "ring_size": ring,
        "num_draft_tokens": DRAFT_TOKENS,
    }
    yield "verification", arguments


def _bytes(a: Arguments) -> int:
    """Written, which is all but the lengths."""
    refused = int((a["num_draft_tokens"] - a["accept_lens"]).sum())
    return refused * sum(nbytes(state[0]) for state in a["layers"].states)


def _problem(a: Arguments) -> str | None:
    """Of states that were finite: the slots of refused tokens are clear, and no other is."""
    cleared = torch.zeros_like(a["layers"].states[0])
    clear_draft_states.reference(**a | {"layers": Layers.of([cleared])})
    scores = cleared.isneginf()
    for layer, states in enumerate(a["layers"].states):
        if not torch.equal(states.isneginf(), scores) or states.chunk(2, 1)[0][scores.any(1)].any():
            return f"layer {layer} has other slots cleared than those of refused tokens"
    return None


SPEC = Spec(
    calls=_calls,
    traffic=lambda a: (_bytes(a), 0),
    served=True,
    speculates=True,
    exact=True,
    problem=_problem,
    synchronises=True,
    prefill="one kernel a layer",
)
