"""SGLang's own CUDA kernel as a provider of `k_norm_rope_store`."""

from __future__ import annotations

from ...registry import Arguments
from . import k_norm_rope_store


@k_norm_rope_store.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def k_norm_rope_store_sglang(a: Arguments) -> None:
    from sglang.kernels.ops.attention.dsv4.norm_rope import fused_k_norm_rope_flashmla

    fused_k_norm_rope_flashmla(a.kv, a.weight, a.eps, a.freqs_cis, a.positions, a.slots, a.pages, a.page_size)
