"""Plan of the KV compressor for a decode step."""

from __future__ import annotations

import torch

from ...formats.compress_plan import DecodePlan, Ring
from ...registry import Op


@Op
def compress_decode_plan(
    ratio: int,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    req_to_token: torch.Tensor,
    full_to_swa: torch.Tensor,
    swa_page_size: int,
    ring_size: int,
) -> torch.Tensor:
    """One row per request: plan_d uint8 [B, 16] as in `formats.compress_plan`, on req_to_token's device.

    seq_lens int [B] >= 1 count the new token. Other arguments as in `compress_prefill_plan`. Source: SGLang's
    `c_plan.cuh`.
    """
    ring = Ring(ratio, req_to_token, full_to_swa, swa_page_size, ring_size)
    ring.check()
    seq_lens, request = seq_lens.to(req_to_token.device).long(), req_pool_indices.to(req_to_token.device)
    last = seq_lens - 1
    write = ring.row(request, last)
    return DecodePlan(seq_lens, write, ring.page(request, (last - ratio).clamp(min=0)), write // ratio).pack()
