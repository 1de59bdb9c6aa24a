"""SGLang's own CUDA kernel as a provider of `k_norm_rope_store`."""

from __future__ import annotations

import torch

from . import k_norm_rope_store


@k_norm_rope_store.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def k_norm_rope_store_sglang(
    kv: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    freqs_cis: torch.Tensor,
    positions: torch.Tensor,
    slots: torch.Tensor,
    pages: torch.Tensor,
    page_size: int,
) -> None:
    from sglang.kernels.ops.attention.dsv4.norm_rope import fused_k_norm_rope_flashmla

    fused_k_norm_rope_flashmla(kv, weight, eps, freqs_cis, positions, slots, pages, page_size)
