"""How many draft tokens one verification may hold before a rejection loses what the KV compressor still needs.

The compressor keeps the last tokens' projections in a ring (`formats.compress_plan.Ring`). A verification writes those
of its draft tokens, and the next one starts behind the accepted ones: whatever was accepted has to be in the ring, and
whatever was rejected must not have overwritten what is older and still needed.

SGLang 0.5.23 keeps all that the ring can. With more draft tokens it reads stale ones after a rejection and says
nothing.
"""

from __future__ import annotations

__all__ = ["MAX_DRAFT_TOKENS", "RING", "require_kept"]

WINDOW = {4: 8, 128: 128}
"""Tokens that one compressed entry is made of, by ratio; ratio 4 overlaps with the block before."""
RING = {4: 16, 128: 256}
"""Slots of the ring while drafts are verified, by ratio (SGLang's `get_compress_state_ring_size`)."""
MAX_DRAFT_TOKENS = min(RING[ratio] - WINDOW[ratio] + 2 for ratio in RING)
"""The first token a later entry needs lies WINDOW - 2 before the verification's start: one token is always accepted."""


def require_kept(draft_tokens: int | None) -> None:
    """Check a server's `--speculative-num-draft-tokens`, or one tier's under `--speculative-adaptive`; None is off.

    Raises:
        ValueError: a rejection could not be taken back.
    """
    if draft_tokens is not None and draft_tokens > MAX_DRAFT_TOKENS:
        raise ValueError(
            f"speculative_num_draft_tokens is {draft_tokens}, but DeepSeek-V4's compressor can take back "
            f"{MAX_DRAFT_TOKENS} tokens: use --speculative-num-steps {MAX_DRAFT_TOKENS - 1} or fewer."
        )
