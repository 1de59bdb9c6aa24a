"""SGLang's own CUDA kernel as a provider of `compress_norm_rope_store`."""

from __future__ import annotations

import torch

from ..compress.sglang import sglangs_plan
from . import compress_norm_rope_store


@compress_norm_rope_store.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def compress_norm_rope_store_sglang(
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
    from sglang.kernels.ops.attention.dsv4.compress import compress_norm_rope_store as kernel

    kernel(
        kv,
        sglangs_plan(ratio, (plan,) if is_decode else (plan, plan), is_decode),
        norm_weight=norm_weight,
        norm_eps=eps,
        freq_cis=freqs_cis,
        out_loc=out_slots,
        kvcache=pages,
        page_size=page_size,
    )
