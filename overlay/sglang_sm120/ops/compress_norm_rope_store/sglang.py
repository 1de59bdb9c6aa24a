"""SGLang's own CUDA kernel as a provider of `compress_norm_rope_store`."""

from __future__ import annotations

from ...registry import Arguments
from ..compress.sglang import sglangs_plan
from . import compress_norm_rope_store


@compress_norm_rope_store.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def compress_norm_rope_store_sglang(a: Arguments) -> None:
    from sglang.kernels.ops.attention.dsv4.compress import compress_norm_rope_store as kernel

    kernel(
        a.kv,
        sglangs_plan(a.ratio, (a.plan,) if a.is_decode else (a.plan, a.plan), a.is_decode),
        norm_weight=a.norm_weight,
        norm_eps=a.eps,
        freq_cis=a.freqs_cis,
        out_loc=a.out_slots,
        kvcache=a.pages,
        page_size=a.page_size,
    )
