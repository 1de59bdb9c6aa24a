"""SGLang's modules as the tensors that the ops take, as they lie; `prepare` replaces what has another form there."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ..formats import experts as layout


class Linear(NamedTuple):
    """FP8 weight e4m3 [N, K] (grouped: [G, N, K]) and its fp32 scale of each 128 x 128 block."""

    weight: torch.Tensor
    scale: torch.Tensor


class Mix(NamedTuple):
    """An mHC mix of the streams: fn fp32 [24 or 4, 4H], its scale and base, and what the op takes besides."""

    fn: torch.Tensor
    scale: torch.Tensor
    base: torch.Tensor
    options: dict[str, Any]


class Compressor(NamedTuple):
    """Projection bf16 [D, H], ape fp32 [window, head_dim], norm fp32 [head_dim]."""

    ratio: int
    head_dim: int
    projection: torch.Tensor
    ape: torch.Tensor
    norm: torch.Tensor
    eps: float
    freqs_cis: torch.Tensor


class Indexer(NamedTuple):
    """Queries of `heads` x 128 channels, head weights bf16 [heads, H] and the compressor of its keys."""

    heads: int
    topk: int
    wq_b: Linear
    head_weights: torch.Tensor
    weight_scale: float
    freqs_cis: torch.Tensor
    compressor: Compressor


class Attention(NamedTuple):
    """A rank's attention: `heads` query heads of 512 channels in `groups` groups of `wo_a`; ratio 0, 4 or 128."""

    layer_id: int
    ratio: int
    heads: int
    groups: int
    q_rank: int
    eps: float
    scale: float
    freqs_cis: torch.Tensor
    wqkv_a: Linear
    q_norm: torch.Tensor
    wq_b: Linear
    kv_norm: torch.Tensor
    sink: torch.Tensor
    wo_a: Linear | torch.Tensor
    wo_b: Linear
    compressor: Compressor | None
    indexer: Indexer | None


class Experts(NamedTuple):
    """A rank's experts `first` … `first + owned - 1` as `ops.mxfp4_moe` or `ops.nvfp4_moe` takes them, the shared one.

    A hash layer has tid2eid int32 [V, k], the others the correction bias fp32 [E].
    """

    gate: torch.Tensor
    bias: torch.Tensor | None
    tid2eid: torch.Tensor | None
    topk: int
    factor: float
    limit: float
    first: int
    owned: int
    weights: layout.Experts | layout.Nvfp4Experts
    shared_gate_up: Linear
    shared_down: Linear


class Layer(NamedTuple):
    """One decoder layer."""

    attention_mix: Mix
    attention: Attention
    experts_mix: Mix
    experts: Experts


def layers_of(model: Any) -> list[Any]:
    """SGLang's decoder layers of a target model, of an MTP model or of a DSpark drafter."""
    if hasattr(model, "stages"):
        return list(model.stages)
    return [model.model.decoder] if hasattr(model.model, "decoder") else list(model.model.layers)


def read(module: Any) -> Layer:
    """One of SGLang's decoder layers (CUDA's or the platform stage's), after its weights were loaded.

    Raises:
        AttributeError: the module lacks what the step reads.
        ValueError: its experts are in a layout that the step does not serve, in a sentence.
    """
    hc = {"iters": module.hc_sinkhorn_iters, "rms_eps": module.rms_norm_eps, "hc_eps": module.hc_eps}

    def mix(block: str, norm: Any) -> Mix:
        fn, scale, base = (getattr(module, f"hc_{block}_{name}") for name in ("fn", "scale", "base"))
        return Mix(fn, scale, base, {**hc, "norm_weight": norm.weight, "norm_eps": module.rms_norm_eps})

    return Layer(
        mix("attn", module.input_layernorm),
        _attention(module.self_attn),
        mix("ffn", module.post_attention_layernorm),
        _experts(module.mlp, module.layer_id),
    )


def head_of(module: Any, rms_eps: float) -> Mix:
    """The mHC head of SGLang's target or MTP model."""
    return Mix(
        module.hc_head_fn, module.hc_head_scale, module.hc_head_base, {"rms_eps": rms_eps, "hc_eps": module.hc_eps}
    )


def linear_of(module: Any) -> Linear:
    return Linear(module.weight, module.weight_scale_inv)


def _attention(m: Any) -> Attention:
    compressor = _compressor(m.compressor) if m.compress_ratio else None
    return Attention(
        m.layer_id, m.compress_ratio, m.n_local_heads, m.n_local_groups, m.q_lora_rank, m.eps, m.softmax_scale,
        m.freqs_cis, _wqkv_a(m), m.q_norm.weight, linear_of(m.wq_b), m.kv_norm.weight,
        m._local_attn_sink(m.n_local_heads), m.wo_a.weight, linear_of(m.wo_b), compressor,
        _indexer(getattr(m, "indexer", None)),
    )  # fmt: skip


def _wqkv_a(m: Any) -> Linear:
    """A drafter's stage has its two apart, and SGLang projects the target's states by the second alone."""
    if hasattr(m, "wqkv_a"):
        return linear_of(m.wqkv_a)
    weight, scale = map(torch.cat, zip(linear_of(m.wq_a), linear_of(m.wkv), strict=True))
    return Linear(weight, scale)


def _indexer(m: Any) -> Indexer | None:
    return m and Indexer(
        m.n_heads, m.index_topk, linear_of(m.wq_b), m.weights_proj.weight, m.weight_scale, m.freqs_cis,
        _compressor(m.compressor),
    )  # fmt: skip


def _compressor(m: Any) -> Compressor:
    ape = m.ape.view(-1, m.head_dim)
    return Compressor(
        m.ratio, m.head_dim, m.wkv_gate.weight, ape, m.norm.weight, m.norm.variance_epsilon, m.freqs_cis
    )


EXPERTS = ("w13_weight", "w13_weight_scale_inv", "w2_weight", "w2_weight_scale_inv")
NVFP4 = tuple(f"{w}_weight{part}" for w in ("w13", "w2") for part in ("", "_scale", "_scale_2"))
"""Names of SGLang's tensors in the order of `formats.experts`."""


def up_first(experts: Any) -> bool:
    """Whether SGLang's module of NVFP4 experts has the rows of w3 first, as the op wants them: `prepare` does that."""
    return bool(getattr(experts, "sglang_sm120_up_first", experts.quant_method.load_up_proj_weight_first))


def _experts(m: Any, layer_id: int) -> Experts:
    kept = _nvfp4(m.experts, layer_id) if hasattr(m.experts, NVFP4[-1]) else _mxfp4(m.experts, layer_id)
    owned, shared = m.experts.num_local_experts, m.shared_experts
    bias, tid2eid = (None, m.topk.tid2eid) if m.is_hash else (m.gate.e_score_correction_bias, None)
    return Experts(
        m.gate.weight, bias, tid2eid, m.top_k, m.routed_scaling_factor, shared.swiglu_limit,
        m.experts.moe_ep_rank * owned, owned, kept, linear_of(shared.gate_up_proj), linear_of(shared.down_proj),
    )  # fmt: skip


def _nvfp4(m: Any, layer_id: int) -> layout.Nvfp4Experts:
    kept = layout.Nvfp4Experts(*(getattr(m, name).data for name in NVFP4))
    method = m.quant_method
    shuffled = method.enable_flashinfer_trtllm_moe or method.enable_flashinfer_cutedsl_moe
    why = "they are shuffled for SM100" if shuffled else layout.nvfp4_refusal(kept)
    if why:
        raise ValueError(
            f"the NVFP4 experts of layer {layer_id} are in another layout ({why.removesuffix('.')}): give "
            "--moe-runner-backend flashinfer_mxfp4, which leaves them as they are."
        )
    return kept


def _mxfp4(m: Any, layer_id: int) -> layout.Experts:
    kept = layout.Experts(*(getattr(m, name).data for name in EXPERTS))
    backend = getattr(m, "_dsv4_mxfp4_backend", None)
    # fp32 scales are what SGLang keeps where it has no kernel for these experts.
    if kept.s13.dtype != torch.float32 and backend != "flashinfer_cutlass_sm120":
        raise ValueError(
            f"the experts of layer {layer_id} are in the layout of {backend or 'no FlashInfer backend'}: leave "
            "--moe-runner-backend at auto (on a card that is no SM12x give triton)."
        )
    return kept
