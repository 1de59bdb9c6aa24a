"""SGLang's own CUDA kernels as providers of the ops that have no Triton kernel of ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .ops import (
    compress,
    compress_norm_rope_store,
    hash_topk,
    indexer_q,
    k_norm_rope_store,
    silu_mul_clamp,
)


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


@indexer_q.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def indexer_q_sglang(
    q: torch.Tensor, weight: torch.Tensor, weight_scale: float, freqs_cis: torch.Tensor, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from sglang.kernels.ops.attention.dsv4.norm_rope import fused_q_indexer_rope_hadamard_quant

    return fused_q_indexer_rope_hadamard_quant(q, weight, weight_scale, freqs_cis, positions)


@hash_topk.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def hash_topk_sglang(
    router_logits: torch.Tensor, input_ids: torch.Tensor, tid2eid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from sglang.kernels.ops.moe.dsv4 import hash_topk as kernel

    return kernel(router_logits, input_ids, tid2eid)


@silu_mul_clamp.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def silu_mul_clamp_sglang(gate_up: torch.Tensor, limit: float) -> torch.Tensor:
    from sglang.kernels.ops.activation.silu_and_mul_clamp import silu_and_mul_clamp

    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    silu_and_mul_clamp(gate_up, out, limit)
    return out


def _plan(ratio: int, plans: Sequence[torch.Tensor], is_decode: bool) -> Any:
    from sglang.kernels.ops.attention.dsv4.compress import CompressorDecodePlan, CompressorPrefillPlan

    return CompressorDecodePlan(ratio, *plans) if is_decode else CompressorPrefillPlan(ratio, *plans)


@compress.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def compress_sglang(
    kv_score_buffer: torch.Tensor,
    kv_score_input: torch.Tensor,
    ape: torch.Tensor,
    plans: Sequence[torch.Tensor],
    is_decode: bool,
    head_dim: int,
    ratio: int,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    from sglang.kernels.ops.attention.dsv4.compress import compress_forward

    return compress_forward(
        kv_score_buffer=kv_score_buffer,
        kv_score_input=kv_score_input,
        ape=ape,
        plan=_plan(ratio, plans, is_decode),
        compress_ratio=ratio,
        head_dim=head_dim,
        out=out,
    )


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
        _plan(ratio, (plan,) if is_decode else (plan, plan), is_decode),
        norm_weight=norm_weight,
        norm_eps=eps,
        freq_cis=freqs_cis,
        out_loc=out_slots,
        kvcache=pages,
        page_size=page_size,
    )
