"""Normalise, rotate and store compressed vectors."""

from __future__ import annotations

import torch

from ...formats import indexer_page, kv_page
from ...formats.compress_plan import CompressPlan, DecodePlan
from ...registry import Op
from .._math import hadamard, rms_norm, rotate_tail


@Op
def compress_norm_rope_store(
    kv: torch.Tensor,
    plan: torch.Tensor,
    is_decode: bool,
    ratio: int,
    norm_weight: torch.Tensor,
    eps: float,
    freqs_cis: torch.Tensor,
    out_slots: torch.Tensor,
    pages: torch.Tensor,
    page_size: int,
) -> None:
    """Store the result of `compress`: RMS norm, RoPE on the last 64 channels at the block's first position.

    kv fp32 [n, 512] goes to KV pages; fp32 [n, 128] is Hadamard-rotated and goes to indexer pages. fp32 up to
    the page's own rounding. plan is the first plan given to `compress`, one row per row of kv; rows that
    complete no block are skipped. out_slots int: indexed by ragged_id in prefill [T], by row in decode [n];
    -1 = do not store. norm_weight [512 or 128]; freqs_cis complex64 [S, 32].
    Source: SGLang's `fused_norm_rope_v2.cuh`.
    """
    if is_decode:
        seq_len = DecodePlan.unpack(plan).seq_len
        done = seq_len % ratio == 0
        slots = out_slots
    else:
        fields = CompressPlan.unpack(plan)
        seq_len, done = fields.seq_len, fields.seq_len >= 0
        slots = out_slots[fields.ragged_id]
    entry = rotate_tail(rms_norm(kv[done], norm_weight, eps), freqs_cis, seq_len[done] - ratio)
    if kv.shape[-1] == kv_page.DIM:
        kv_page.store(pages, slots[done], entry, page_size)
    elif kv.shape[-1] == indexer_page.DIM:
        indexer_page.store(pages, slots[done], hadamard(entry), page_size)
    else:
        raise ValueError(
            f"compressed vectors have {kv.shape[-1]} channels and need {kv_page.DIM} (KV) or "
            f"{indexer_page.DIM} (indexer)."
        )
