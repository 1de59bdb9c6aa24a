"""Plan of the KV compressor for a prefill step: which blocks end, and which tokens to keep."""

from __future__ import annotations

import torch

from ...formats.compress_plan import MAX_TOKENS, CompressPlan, Ring, WritePlan
from ...registry import Op


@Op
def compress_prefill_plan(
    ratio: int,
    req_pool_indices: torch.Tensor,
    seq_lens: torch.Tensor,
    extend_lens: torch.Tensor,
    req_to_token: torch.Tensor,
    full_to_swa: torch.Tensor,
    swa_page_size: int,
    ring_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plans for requests with seq_lens int [B] tokens, of which the last extend_lens int [B] are new.

    ratio 4 or 128; req_pool_indices int [B] are rows of req_to_token int32 [R, L]; full_to_swa int64 [N];
    ring addressing as in `formats.compress_plan.Ring`: ratio 4 by window page, ratio 128 by request.

    Every new token that ends a block gets a compress row. Tokens a later step may need get a write row: those
    of the last incomplete block, and with ratio 4 also those of the last complete block and of the last block
    of each window page, where a prefix hit resumes; also the last `Ring.drafts`, of which only the first may be
    accepted. Rows are in token order, no invalid ones: (plan_c uint8 [C, 16], plan_w uint8 [W, 8]) as in
    `formats.compress_plan`, on req_to_token's device.

    Raises ValueError for more than 65,536 new tokens or an extend_len outside 1 … seq_len. Source: SGLang's
    `c_plan.cuh`.
    """
    ring = Ring(ratio, req_to_token, full_to_swa, swa_page_size, ring_size)
    ring.check()
    seq_lens, extend_lens = seq_lens.long(), extend_lens.long()
    if bool(((extend_lens < 1) | (extend_lens > seq_lens)).any()):
        raise ValueError(
            f"extend_lens {extend_lens.tolist()} with seq_lens {seq_lens.tolist()} need 1 <= extend_len <= seq_len."
        )
    tokens = int(extend_lens.sum())
    if tokens > MAX_TOKENS:
        raise ValueError(
            f"a prefill step has {tokens} tokens and the plan's 16-bit rows allow {MAX_TOKENS}; "
            "lower the chunked prefill size."
        )
    device = req_to_token.device
    overlap = ring.window - ratio
    seq_lens, extend_lens = seq_lens.to(device), extend_lens.to(device)
    batch = torch.repeat_interleave(torch.arange(len(seq_lens), device=device), extend_lens)
    request = req_pool_indices.to(device)[batch]
    ragged = torch.arange(tokens, device=device)
    step = ragged - (extend_lens.cumsum(0) - extend_lens)[batch]
    position = (seq_lens - extend_lens)[batch] + step

    ends = ((position + 1) % ratio == 0).nonzero().squeeze(1)
    at = position[ends]
    buffer_len = ring.window - (step[ends] + 1).clamp(max=ring.window)
    page_0, page_1 = ring.page(request[ends], (at - ratio).clamp(min=0)), ring.page(request[ends], at)
    reads = buffer_len > 0
    plan_c = CompressPlan(
        at + 1, ends, buffer_len, torch.where(reads, page_0, -1), torch.where(reads, page_1, batch[ends])
    )
    keep = position >= torch.minimum(seq_lens // ratio * ratio - overlap, seq_lens - ring.drafts)[batch]
    keep |= position % swa_page_size >= swa_page_size - overlap
    kept = keep.nonzero().squeeze(1)
    return plan_c.pack(), WritePlan(kept, ring.row(request[kept], position[kept])).pack()
