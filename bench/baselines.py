"""Other implementations of the ops that run on the same GPU: what the benchmark times beside ours.

Each is called as SGLang 0.5.23 calls it. Weight conversion and what SGLang plans once a step happen in `prepare`;
what it does at every call, such as quantising activations to FP8, is part of the timed callable. Before it is timed,
its result is compared with the op's reference (`problem_of`), on the first rows, so that 4,096 rows cost no minutes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from calls import ROWS_COMPARED, difference, reference_result, sample, tensors
from sglang_sm120 import ops, registry
from sglang_sm120.formats import e8m0, fp8_block, kv_page, mxfp4
from sglang_sm120.ops import sinkhorn
from sglang_sm120.ops._math import rms_norm
from sglang_sm120.spec import Call
from sglang_sm120.tolerance import BF16, EXACT, FP32, Tolerance

Arguments = dict[str, Any]
Run = Callable[[], Any]
FP8_ACTIVATIONS = Tolerance(0.05, 0.1)
"""E4M3 rounds an activation by up to 2^-4, 2.6 % in the mean, and so the sums; the largest of many by thrice that."""
TF32 = Tolerance(5e-3, 2e-2)
"""TF32 keeps 10 bits of the mixing products, and bf16 rounds the result at another place by up to 2^-8."""
BF16_STEPS = Tolerance(1e-2, 3e-2)
"""Gate, up and each expert's output are rounded to bf16 (2^-9 each) where the reference keeps fp32."""
FP8_SUMS = Tolerance(2e-3, 1e-2)
"""Hopper's tensor cores keep some 14 bits of a sum of FP8 products."""
CUBLAS = Tolerance(1e-4, 1e-3)
"""The tensor cores of Hopper truncate the terms of an fp32 sum."""
CHOSEN_ELSEWHERE = 0.01
"""Share of chosen slots that may differ: entries next to the k-th whose scores round the other way."""


def _as_given(arguments: Arguments) -> Arguments:
    return arguments


class Baseline(NamedTuple):
    """One other implementation of an op.

    prepare(arguments) converts weights and plans, and returns what is timed. computes(arguments) are the arguments
    for which the reference gives the same result. compiles: its first call builds kernels. lowered: it is Triton code,
    so SM120 lowering applies to it as to ours. captured: it can be captured in a CUDA graph.
    """

    name: str
    op: str
    note: str
    prepare: Callable[[Arguments], Run]
    tolerance: Tolerance
    needs: tuple[str, ...] = ()
    computes: Callable[[Arguments], Arguments] = _as_given
    compiles: bool = False
    lowered: bool = False
    captured: bool = True

    def available(self) -> str | None:
        """None, or why it cannot run here."""
        missing = [name for name in self.needs if find_spec(name) is None]
        return f"{', '.join(missing)} not installed" if missing else None


def problem_of(baseline: Baseline, call: Call, result: Any) -> str | None:
    """None, or how the first rows of the baseline's `result` differ from the reference's."""
    part, got = sample(call), [t[:ROWS_COMPARED] for t in tensors(result)]
    expected = reference_result(Call(call.op, call.label, baseline.computes(part.arguments)))
    if len(got) != len(expected):
        return f"it gives {len(got)} tensors and the op {len(expected)}"
    for a, b in zip(got, expected, strict=True):
        if problem := _choice_problem(a, b) if b.dtype == torch.int32 else _values_problem(a, b, baseline.tolerance):
            return problem
    return None


def _values_problem(got: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> str | None:
    if got.shape == expected.shape:
        # Beyond a row's length upstream's scores are whatever was there, and nobody reads them.
        got = torch.where(expected.isfinite(), got, expected)
    return difference(got, expected, tolerance)


def _choice_problem(got: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Whether both choose the same slots or experts, in any order, near ties apart."""
    if got.shape != expected.shape:
        return f"it chooses {list(got.shape)} and the op {list(expected.shape)}"
    rows = list(zip(got.tolist(), expected.tolist(), strict=True))
    same, wanted = sum(len({*a} & {*b}) for a, b in rows), sum(len({*b}) for _, b in rows)
    if same < (1 - CHOSEN_ELSEWHERE) * wanted:
        return f"{1 - same / wanted:.1%} of its choices differ (allowed {CHOSEN_ELSEWHERE:.0%})"
    return None


def _fp32_scale(scale: torch.Tensor) -> torch.Tensor:
    return (scale if scale.dtype == torch.float32 else e8m0.to_float(scale)).contiguous()


def _quantised(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """FP8 activations with one fp32 scale per 128, in the layout DeepGEMM reads on SM90 (scales column-major)."""
    from sglang.kernels.ops.quantization.fp8_kernel import sglang_per_token_group_quant_fp8

    return sglang_per_token_group_quant_fp8(x, 128, column_major_scales=True, scale_tma_aligned=True)


def _deep_gemm_linear(a: Arguments) -> Run:
    import deep_gemm

    x, weight = a["x"].contiguous(), (a["w"], _fp32_scale(a["scale"]))

    def run() -> torch.Tensor:
        y = torch.empty(x.shape[0], weight[0].shape[0], dtype=torch.bfloat16, device=x.device)
        deep_gemm.fp8_gemm_nt(_quantised(x), weight, y)
        return y

    return run


def _sglang_triton_linear(a: Arguments) -> Run:
    from sglang.srt.layers.quantization.fp8_utils import triton_w8a8_block_fp8_linear

    x, scale = a["x"].contiguous(), _fp32_scale(a["scale"])
    return lambda: triton_w8a8_block_fp8_linear(x, a["w"], [128, 128], scale)


def _dequantised_groups(a: Arguments) -> torch.Tensor:
    return torch.stack([fp8_block.dequantise(w, s) for w, s in zip(a["w"], a["scale"], strict=True)]).bfloat16()


def _einsum_grouped(a: Arguments) -> Run:
    w = _dequantised_groups(a)
    return lambda: torch.einsum("tgd,grd->tgr", a["o"], w)


def _deep_gemm_grouped(a: Arguments) -> Run:
    """One FP8 GEMM per group: `fp8_einsum`, which SGLang calls, has an SM100 kernel only."""
    import deep_gemm

    o, weights = a["o"], list(zip(a["w"], _fp32_scale(a["scale"]), strict=True))

    def run() -> torch.Tensor:
        parts = [torch.empty(o.shape[0], w.shape[0], dtype=torch.bfloat16, device=o.device) for w, _ in weights]
        for group, (weight, part) in enumerate(zip(weights, parts, strict=True)):
            deep_gemm.fp8_gemm_nt(_quantised(o[:, group].contiguous()), weight, part)
        return torch.stack(parts, dim=1)

    return run


def _deep_gemm_einsum(a: Arguments) -> Run:
    import deep_gemm

    o, w = a["o"], _dequantised_groups(a)

    def run() -> torch.Tensor:
        y = torch.empty(o.shape[0], w.shape[0], w.shape[1], dtype=torch.bfloat16, device=o.device)
        deep_gemm.einsum("bhr,hdr->bhd", o, w, y)
        return y

    return run


def _cublas_linear(a: Arguments) -> Run:
    w = a["w"].T
    return lambda: torch.mm(a["x"], w, out_dtype=torch.float32)


def _deep_gemm_logits(a: Arguments) -> Callable[[], torch.Tensor]:
    import deep_gemm

    size, table, q = a["page_size"], a["page_table"], a["q"].unsqueeze(1)
    pages = a["pages"].view(-1, size, 1, a["pages"].shape[1] // size)
    lengths = a["lengths"].int().unsqueeze(1)
    plan = deep_gemm.get_paged_mqa_logits_metadata(lengths, size, deep_gemm.get_num_sms())
    width = table.shape[1] * size
    return lambda: deep_gemm.fp8_paged_mqa_logits(q, pages, a["weights"], lengths, table, plan, width, False)


def _sglang_topk(a: Arguments) -> Callable[[torch.Tensor], torch.Tensor]:
    from sglang.kernels.ops.attention.dsv4.topk import plan_topk_v2, topk_transform_paged_v2

    lengths, table = a["lengths"].int(), a["page_table"]
    plan = plan_topk_v2(lengths)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        slots = torch.empty(logits.shape[0], a["k"], dtype=torch.int32, device=logits.device)
        topk_transform_paged_v2(logits, lengths, table, slots, a["page_size"], plan)
        return slots

    return choose


def _sglang_topk_slots(a: Arguments) -> Run:
    choose = _sglang_topk(a)
    return lambda: choose(a["logits"])


def _sglang_torch_topk(a: Arguments) -> Run:
    from sglang.srt.layers.attention.dsv4.indexer import topk_transform_pytorch_vectorized

    slots = torch.empty(a["logits"].shape[0], a["k"], dtype=torch.int32, device=a["logits"].device)

    def run() -> torch.Tensor:
        topk_transform_pytorch_vectorized(a["logits"], a["lengths"], a["page_table"], slots, a["page_size"])
        return slots

    return run


def _sglang_gate(a: Arguments) -> Run:
    from sglang.kernels.ops.moe.moe_fused_gate import moe_fused_gate

    return lambda: moe_fused_gate(
        a["router_logits"], a["correction_bias"], a["k"], "sqrtsoftplus", renormalize=a["renormalize"]
    )


def _deep_gemm_indexer(a: Arguments) -> Run:
    score, choose = _deep_gemm_logits(a), _sglang_topk(a)
    return lambda: choose(score())


def _sglang_torch_logits(a: Arguments) -> Run:
    from sglang.srt.layers.attention.dsv4.indexer import fp8_paged_mqa_logits_torch

    size, table, q = a["page_size"], a["page_table"], a["q"].unsqueeze(1)
    pages = a["pages"].view(-1, size, 1, a["pages"].shape[1] // size)
    width = table.shape[1] * size
    return lambda: fp8_paged_mqa_logits_torch(q, pages, a["weights"], a["lengths"], table, None, width, False)


def _without(*names: str) -> Callable[[Arguments], Arguments]:
    return lambda a: {name: value for name, value in a.items() if name not in names}


def _without_turn(a: Arguments) -> Arguments:
    return {**a, "freqs_cis": None, "positions": None}


FLASH_MLA_HEADS = 64


def _flash_mla(a: Arguments) -> Run:
    """FlashMLA's sparse decode of both caches, with the sink; heads padded to 64 as SGLang pads them."""
    from sglang.kernels.ops.attention.flash_mla_interface import flash_mla_with_kvcache, get_mla_metadata

    q = a["q"]
    rows, heads, dim = q.shape
    padded = torch.zeros(rows, 1, FLASH_MLA_HEADS, dim, dtype=q.dtype, device=q.device)
    sink = torch.nn.functional.pad(a["sink"], (0, FLASH_MLA_HEADS - heads))
    extra: tuple[torch.Tensor | None, ...] = (None, None, None)
    if a["extra_pages"] is not None:
        extra = _of_flash_mla(a, "extra")
    cache, slots, lengths = _of_flash_mla(a, "window")
    # The first call plans into it, the others take it from there, as the layers of a step do.
    plan, _ = get_mla_metadata()

    def run() -> torch.Tensor:
        padded[:, 0, :heads] = q
        out, _ = flash_mla_with_kvcache(
            q=padded, k_cache=cache, block_table=None, cache_seqlens=None, head_dim_v=dim, tile_scheduler_metadata=plan,
            softmax_scale=a["scale"], is_fp8_kvcache=True, indices=slots, topk_length=lengths, attn_sink=sink,
            extra_k_cache=extra[0], extra_indices_in_kvcache=extra[1], extra_topk_length=extra[2],
        )  # fmt: skip
        return out[:, 0, :heads]

    return run


def _of_flash_mla(a: Arguments, which: str) -> tuple[torch.Tensor, ...]:
    """A cache as [pages, size, 1, 584] over its strided pages, slots [T, 1, multiple of 64] and lengths."""
    pages, slots, size = a[f"{which}_pages"], a[f"{which}_slots"], a[f"{which}_page_size"]
    entry = kv_page.ROW + kv_page.FOOTER
    cache = pages.as_strided((pages.shape[0], size, 1, entry), (pages.stride(0), entry, entry, 1))
    slots = torch.nn.functional.pad(slots, (0, -slots.shape[1] % 64), value=-1).unsqueeze(1)
    return cache, slots, a[f"{which}_lengths"].int()


_marlin_weights: tuple[torch.Tensor, torch.nn.Module] | None = None


def _marlin_layer(a: Arguments) -> torch.nn.Module:
    """The experts in Marlin's layout, kept for the next call with the same weights."""
    from sglang.srt.layers.quantization.marlin_utils_fp4 import prepare_moe_mxfp4_layer_for_marlin

    global _marlin_weights
    if _marlin_weights is None or _marlin_weights[0] is not a["w13"]:
        _marlin_weights = None
        layer = torch.nn.Module()
        # Gate first, scales row-major.
        inter = a["w13"].shape[1] // 2
        s13, s2 = (mxfp4.unswizzle_scales(a[name].view(torch.uint8)) for name in ("s13", "s2"))
        given = {"w13_weight": a["w13"].view(torch.int8).roll(inter, 1), "w2_weight": a["w2"].view(torch.int8)}
        given |= {"w13_weight_scale": s13.roll(inter, 1).view(torch.float8_e8m0fnu)}
        given |= {"w2_weight_scale": s2.view(torch.float8_e8m0fnu)}
        for name, value in given.items():
            setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
        prepare_moe_mxfp4_layer_for_marlin(layer)
        _marlin_weights = (a["w13"], layer)
    return _marlin_weights[1]


def _marlin(a: Arguments) -> Run:
    from sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe import fused_marlin_moe

    layer = _marlin_layer(a)
    return lambda: fused_marlin_moe(
        hidden_states=a["x"],
        w1=layer.w13_weight,
        w2=layer.w2_weight,
        w1_scale=layer.w13_weight_scale,
        w2_scale=layer.w2_weight_scale,
        gating_output=a["topk_weights"],
        topk_weights=a["topk_weights"],
        topk_ids=a["topk_ids"],
        workspace=layer.workspace,
        num_bits=4,
        clamp_limit=a["limit"],
    )


def _upstream_post(f: torch.Tensor, x: torch.Tensor, post: torch.Tensor, comb: torch.Tensor) -> torch.Tensor:
    """SGLang's torch branch of `hc_post`: every product of a stream pair is materialised."""
    return (post.unsqueeze(-1) * f.unsqueeze(1) + (comb.unsqueeze(-1) * x.unsqueeze(2)).sum(1)).to(f.dtype)


def _prenorm_splits(rows: int, width: int, device: torch.device) -> int:
    """How SGLang splits the mixing GEMM over its depth (`kernels/ops/layernorm/mhc.py`)."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return max(1, min(sms // -(-rows // 64), width // 64 // 4))


def _deep_gemm_mix(x: torch.Tensor, a: Arguments) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """DeepGEMM's mixing GEMM with sums of squares; weights, sum of streams and norm in torch."""
    import deep_gemm

    flat = x.flatten(1)
    splits = _prenorm_splits(flat.shape[0], flat.shape[1], x.device)
    products = torch.empty(splits, flat.shape[0], a["fn"].shape[0], device=x.device)
    squares = torch.empty(splits, flat.shape[0], device=x.device)
    deep_gemm.tf32_hc_prenorm_gemm(flat, a["fn"], products, squares, num_splits=splits)
    mixes = products.sum(0) * torch.rsqrt(squares.sum(0) / flat.shape[1] + 1e-6).unsqueeze(1)
    pre, post, comb = sinkhorn.reference(mixes, a["scale"], a["base"], 20, 1e-6)
    y = (pre.unsqueeze(-1) * x.float()).sum(1).bfloat16()
    return rms_norm(y, a["norm_weight"], 1e-6).bfloat16(), post, comb


def _deep_gemm_post_pre(a: Arguments) -> Run:
    def run() -> tuple[torch.Tensor, ...]:
        x = _upstream_post(a["f"], a["x"], a["post"], a["comb"])
        return x, *_deep_gemm_mix(x, a)

    return run


def _tilelang_pre(a: Arguments) -> Run:
    from sglang.kernels.ops.layernorm.mhc import mhc_pre
    from sglang.srt.runtime_context import get_parallel

    def run() -> tuple[torch.Tensor, ...]:
        # Asked for, but not used without symmetric memory.
        with get_parallel().override(tp_group=None):
            post, comb, y = mhc_pre(
                a["x"], a["fn"], a["scale"], a["base"], 1e-6, 1e-6, 1e-6, 2.0, 20,
                norm_weight=a["norm_weight"], norm_eps=1e-6,
            )  # fmt: skip
        return y, post.view(-1, 4), comb.view(-1, 4, 4)

    return run


def _tilelang_post(a: Arguments) -> Run:
    # `mhc_post` around it wants a server's arguments.
    from sglang.kernels.ops.layernorm.mhc import mhc_post_tilelang

    out = torch.empty_like(a["x"])
    rows, streams, hidden = out.shape
    # As `mhc_post` spreads a row of few.
    parts = hidden // math.gcd(hidden, 1024) if rows <= 256 else 1

    def run() -> torch.Tensor:
        mhc_post_tilelang(a["comb"], a["x"], a["post"], a["f"], out, streams, hidden, num_h_blocks=parts)
        return out

    return run


def _tilelang_post_pre(a: Arguments) -> Run:
    from sglang.kernels.ops.layernorm.mhc import mhc_fused_post_pre
    from sglang.srt.runtime_context import get_parallel

    def run() -> tuple[torch.Tensor, ...]:
        with get_parallel().override(tp_group=None):
            x, post, comb, y = mhc_fused_post_pre(
                a["f"], a["x"], a["post"], a["comb"], a["fn"], a["scale"], a["base"], 1e-6, 1e-6, 1e-6, 2.0, 20,
                norm_weight=a["norm_weight"], norm_eps=1e-6,
            )  # fmt: skip
        return x, y, post.view(-1, 4), comb

    return run


def _tilelang_sinkhorn(a: Arguments) -> Run:
    from sglang.kernels.ops.layernorm.mhc import hc_split_sinkhorn

    def run() -> tuple[torch.Tensor, ...]:
        parts = hc_split_sinkhorn(a["mixes"].unsqueeze(1), a["scale"], a["base"], 4, a["iters"], a["eps"])
        return tuple(part.squeeze(1) for part in parts)

    return run


def _sglang_head(a: Arguments) -> Run:
    from sglang.kernels.ops.layernorm.mhc_head import fused_hc_head

    return lambda: fused_hc_head(a["x"], a["fn"], a["scale"], a["base"], 1e-6, 1e-6)


REFERENCE = "torch"
SLOW = ("marlin", "tilelang")
"""Built for minutes at their first call: only on request."""
_QUANTISES = "activations quantised to FP8 inside the timing, as SGLang does"
_GEMM = ("deep_gemm", "sglang")


def _torch_baseline(op: str) -> Baseline:
    def prepare(a: Arguments) -> Run:
        return lambda: registry.ops()[op].reference(**a)

    return Baseline(REFERENCE, op, "this project's reference", prepare, EXACT, captured=not ops.SPECS[op].synchronises)


_OTHERS = [
    Baseline("deep_gemm", "fp8_linear", f"fp8_gemm_nt; {_QUANTISES}", _deep_gemm_linear, FP8_ACTIVATIONS, _GEMM,
             computes=_without("norm_weight", "eps"), compiles=True),
    Baseline("sglang_triton", "fp8_linear", f"w8a8_block_fp8_matmul, untuned; {_QUANTISES}", _sglang_triton_linear,
             FP8_ACTIVATIONS, ("sglang",), computes=_without("norm_weight", "eps"), compiles=True, lowered=True),
    Baseline("deep_gemm", "fp8_grouped_linear", f"fp8_gemm_nt once per group; {_QUANTISES}", _deep_gemm_grouped,
             FP8_ACTIVATIONS, _GEMM, compiles=True),
    Baseline("deep_gemm_bf16", "fp8_grouped_linear", "einsum bhr,hdr->bhd with bf16 weights", _deep_gemm_einsum, BF16,
             ("deep_gemm",), compiles=True),
    Baseline("sglang_torch", "fp8_grouped_linear", "einsum with bf16 weights, SGLang's path on Hopper",
             _einsum_grouped, BF16),
    Baseline("cublas", "bf16_linear_fp32", "bf16 GEMM with fp32 result, what SGLang's linear_bf16_fp32 calls",
             _cublas_linear, CUBLAS, computes=_without("dtype")),
    Baseline("deep_gemm", "indexer_logits", "fp8_paged_mqa_logits, its plan made outside", _deep_gemm_logits,
             FP8_SUMS, ("deep_gemm",), compiles=True),
    Baseline("sglang_torch", "indexer_logits", "fp8_paged_mqa_logits_torch, a loop over rows", _sglang_torch_logits,
             FP32, ("sglang",), captured=False),
    Baseline("deep_gemm", "indexer_topk", "fp8_paged_mqa_logits + topk_transform_paged_v2, plans made outside",
             _deep_gemm_indexer, EXACT, _GEMM, compiles=True),
    Baseline("sglang_cuda", "topk_slots", "topk_transform_paged_v2, its plan made outside", _sglang_topk_slots, EXACT,
             ("sglang",), compiles=True),
    Baseline("sglang_torch", "topk_slots", "topk_transform_pytorch_vectorized", _sglang_torch_topk, EXACT,
             ("sglang",), captured=False),
    Baseline("sglang_cuda", "router_topk", "moe_fused_gate", _sglang_gate, FP32, ("sglang",), compiles=True),
    Baseline("flash_mla", "sparse_mla", "FlashMLA's sparse decode: no inverse RoPE, 64 heads", _flash_mla, BF16_STEPS,
             ("flash_mla", "sglang"), computes=_without_turn),
    Baseline("marlin", "mxfp4_moe", "SGLang's Marlin MXFP4 MoE", _marlin, BF16_STEPS, ("sglang",), compiles=True),
    Baseline("deep_gemm", "mhc_pre", "tf32_hc_prenorm_gemm, the rest in torch",
             lambda a: lambda: _deep_gemm_mix(a["x"], a), TF32, ("deep_gemm",), compiles=True),
    Baseline("deep_gemm", "mhc_post_pre", "SGLang's torch hc_post, tf32_hc_prenorm_gemm, the rest in torch",
             _deep_gemm_post_pre, TF32, ("deep_gemm",), compiles=True),
    Baseline("sglang_torch", "mhc_post", "SGLang's torch hc_post, not compiled",
             lambda a: lambda: _upstream_post(a["f"], a["x"], a["post"], a["comb"]), BF16),
    Baseline("tilelang", "mhc_pre", "SGLang's mhc_pre: DeepGEMM and TileLang", _tilelang_pre, TF32,
             ("tilelang", *_GEMM), compiles=True),
    Baseline("tilelang", "mhc_post", "SGLang's mhc_post_tilelang", _tilelang_post, BF16, ("tilelang", "sglang"),
             compiles=True),
    Baseline("tilelang", "mhc_post_pre", "SGLang's mhc_fused_post_pre", _tilelang_post_pre, TF32,
             ("tilelang", *_GEMM), compiles=True),
    Baseline("tilelang", "sinkhorn", "SGLang's hc_split_sinkhorn", _tilelang_sinkhorn, FP32, ("tilelang", "sglang"),
             compiles=True),
    Baseline("sglang_triton", "mhc_head", "SGLang's fused_hc_head", _sglang_head, BF16, ("sglang",), compiles=True,
             lowered=True),
]  # fmt: skip


def names() -> list[str]:
    """Names of all baselines, the slow ones last."""
    found = dict.fromkeys([REFERENCE, *(b.name for b in _OTHERS)])
    return sorted(found, key=lambda name: name in SLOW)


def baselines(op: str, chosen: list[str]) -> list[Baseline]:
    """The chosen baselines of an op."""
    return [b for b in [*(b for b in _OTHERS if b.op == op), _torch_baseline(op)] if b.name in chosen]
