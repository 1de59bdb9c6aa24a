"""What SGLang's kernel keeps of a verification's draft tokens, planned on the device inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from cases.common import Maker
from cases.compress_prefill_plan import mapping

from sglang_sm120 import ops
from sglang_sm120.limits import MAX_DRAFT_TOKENS, RING

REQUESTS = 48


def rows(plan: torch.Tensor) -> set[bytes]:
    """The rows of a plan, in no order and without the invalid ones, whose first word is all ones."""
    return {bytes(row) for row in plan.cpu().tolist()} - {bytes(row) for row in _invalid(plan.shape[1])}


def _invalid(size: int) -> list[list[int]]:
    last = [255] * 4
    return [last + ([0] * 4 + last * 2 if size == 16 else last)]


@pytest.mark.parametrize("drafts", [2, 4, 5, 8, MAX_DRAFT_TOKENS])
@pytest.mark.parametrize("ratio", [4, 128])
def test_device_plan_is_the_ops(ratio: int, drafts: int, seed: int) -> None:
    compress = pytest.importorskip("sglang.kernels.ops.attention.dsv4.compress")
    device = torch.device("cuda")
    make = Maker(seed, device)
    arguments = {
        # Every remainder of both block sizes, and requests that have just begun.
        "seq_lens": torch.arange(REQUESTS, device=device) * 21 % 1000 + drafts + 1,
        "extend_lens": torch.full((REQUESTS,), drafts, device=device),
        "ring_size": RING[ratio],
        **mapping(make, REQUESTS),
    }
    expected = ops.compress_prefill_plan.reference(ratio, **arguments)
    arguments["full_to_state"] = arguments.pop("full_to_swa")
    found = compress.CompressorPrefillPlan.generate(
        ratio, num_q_tokens=REQUESTS * drafts, use_cuda_graph=True, **arguments
    )
    assert rows(found.plan_c) == rows(expected[0])
    assert rows(found.plan_w) == rows(expected[1])
    # Each draft token is kept: all but the first may be rejected.
    assert len(rows(found.plan_w)) == REQUESTS * drafts
