"""Other implementations of `clear_draft_states`."""

from __future__ import annotations

from baselines import Arguments, Baseline, Run
from sglang_sm120.tolerance import EXACT


def _a_layer(a: Arguments) -> Run:
    from sglang.kernels.ops.kvcache.dsv4_c128_cleanup import clear_unaccepted_c128_draft_states

    requests, lengths, accepted = a["req_pool_indices"], a["seq_lens"], a["accept_lens"]
    ring, drafts = a["ring_size"], a["num_draft_tokens"]

    def clear() -> None:
        for states in a["layers"].states:
            clear_unaccepted_c128_draft_states(
                states, requests, lengths, accepted, ring_size=ring, num_draft_tokens=drafts
            )

    return clear


OTHERS = [
    Baseline("sglang_pool", "one kernel a layer", _a_layer, EXACT, needs=("sglang",), lowered=True),
]
