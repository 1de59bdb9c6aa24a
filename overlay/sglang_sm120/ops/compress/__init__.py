"""KV compression: a block of tokens to one vector by a per-channel softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ...formats.compress_plan import CompressPlan, DecodePlan, WritePlan
from ...registry import Op
from .._math import row_chunks


@Op
def compress(
    kv_score_buffer: torch.Tensor,
    kv_score_input: torch.Tensor,
    ape: torch.Tensor,
    plans: Sequence[torch.Tensor],
    is_decode: bool,
    head_dim: int,
    ratio: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compress the blocks that plans list, and keep new tokens in the state ring.

        out = Σ_i softmax_i(score_i + ape_i) kv_i     per channel, over the block's tokens i

    Ratio 128: a token's row is kv | score, each head_dim wide, and i runs over the block's 128 tokens, ape
    fp32 [128, head_dim]. Ratio 4: a row is previous kv | kv | previous score | score; i runs over 8 tokens,
    the previous block's 4 with their `previous` parts and this block's 4 with the others, ape fp32 [8,
    head_dim] in that order; the first block of a request has no predecessor and those 4 weigh nothing.

    kv_score_buffer fp32 [pages, ratio, D] is the ring (written in place, any page stride), kv_score_input
    fp32 [T, D] the new tokens. Prefill: plans = (plan_c, plan_w); reads the ring and the input first, then
    writes. Decode: plans = (plan_d,); writes first, then reads the ring. Returns fp32, one row per row of the
    first plan, to out if given; rows that complete no block are zero. Source: SGLang's `c4_v2.cuh`,
    `c128_v2.cuh`.
    """
    window = 2 * ratio if ratio == 4 else ratio
    width = 2 * head_dim * window // ratio
    if kv_score_input.shape[-1] != width or tuple(kv_score_buffer.shape[1:]) != (ratio, width):
        raise ValueError(
            f"input {list(kv_score_input.shape)} and ring {list(kv_score_buffer.shape)} need rows of {width} "
            f"for ratio {ratio} and head_dim {head_dim}, and {ratio} rows per ring page."
        )
    if tuple(ape.shape) != (window, head_dim):
        raise ValueError(f"ape is {list(ape.shape)} and needs [{window}, {head_dim}] for ratio {ratio}.")
    if is_decode:
        decode = DecodePlan.unpack(plans[0])
        _write(kv_score_buffer, kv_score_input, decode.write_loc)
        plan = CompressPlan(
            torch.where(decode.seq_len % ratio == 0, decode.seq_len, -1),
            torch.zeros_like(decode.seq_len),
            torch.full_like(decode.seq_len, window),
            decode.read_page_0,
            decode.read_page_1,
        )
    else:
        plan = CompressPlan.unpack(plans[0])
    if out is None:
        out = kv_score_input.new_empty((len(plan.seq_len), head_dim))
    out.zero_()
    done = (plan.seq_len >= 0).nonzero().squeeze(1)
    for chunk in row_chunks(len(done), window * width * 12):
        rows = done[chunk]
        block = CompressPlan(*(field[rows] for field in plan))
        kv, score = _block(kv_score_buffer, kv_score_input, block, head_dim, ratio, window)
        out[rows] = ((score + ape.float()).softmax(1) * kv).sum(1).to(out.dtype)
    if not is_decode:
        write = WritePlan.unpack(plans[1])
        valid = write.ragged_id >= 0
        _write(kv_score_buffer, kv_score_input[write.ragged_id[valid]], write.write_loc[valid])
    return out


def _block(
    ring: torch.Tensor, new: torch.Tensor, plan: CompressPlan, head_dim: int, ratio: int, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """kv and score fp32 [n, window, head_dim] of each planned block's tokens, oldest first."""
    i = torch.arange(window, device=ring.device)
    in_ring = i < plan.buffer_len.unsqueeze(1)
    page = torch.where(i < window - ratio, plan.read_page_0.unsqueeze(1), plan.read_page_1.unsqueeze(1))
    recent = (plan.ragged_id.unsqueeze(1) - (window - 1) + i).clamp(min=0)
    kept = ring[page.clamp(0, len(ring) - 1), i % ratio]
    rows = torch.where(in_ring.unsqueeze(-1), kept, new[recent]).float()
    if window == ratio:
        return rows[..., :head_dim], rows[..., head_dim:]
    old, own = rows[:, :ratio].unflatten(-1, (4, head_dim)), rows[:, ratio:].unflatten(-1, (4, head_dim))
    first = (plan.seq_len <= ratio).view(-1, 1, 1)
    kv = torch.cat((old[:, :, 0].masked_fill(first, 0), own[:, :, 1]), dim=1)
    score = torch.cat((old[:, :, 2].masked_fill(first, -torch.inf), own[:, :, 3]), dim=1)
    return kv, score


def _write(ring: torch.Tensor, rows: torch.Tensor, loc: torch.Tensor) -> None:
    ring[loc // ring.shape[1], loc % ring.shape[1]] = rows.to(ring.dtype)
