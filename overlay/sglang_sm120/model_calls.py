"""Every call that the real model makes of the ops the overlay replaces, generated from its `config.json`.

On meta tensors the calls are what the compile gate, the warm-up and the scratch plan rehearse; on a GPU, with random
values, they are the benchmarks' and the parity tests' inputs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .formats import indexer_page, kv_page

C4_PAGE, C128_PAGE, WINDOW_PAGE = 64, 2, 256
"""Entries per page of the three caches at SGLang's page size of 256 tokens."""
FP8_LINEARS = ("wqkv_a", "wq_b", "wo_b", "indexer.wq_b", "shared.w13", "shared.w2", "mtp.e_proj", "mtp.h_proj")


@dataclass(frozen=True)
class Call:
    """One call: `op` by name, what it is in the model, and its keyword arguments."""

    op: str
    label: str
    arguments: dict[str, Any]


class Inputs:
    """Random inputs on a device; on `meta` shapes and dtypes alone."""

    def __init__(self, device: torch.device, seed: int) -> None:
        self.device = device
        self._rng = torch.Generator(device).manual_seed(seed) if device.type != "meta" else None

    def _empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=self.device)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Normal values times scale."""
        if self._rng is None:
            return self._empty(*shape, dtype=dtype)
        return (torch.randn(shape, generator=self._rng, device=self.device) * scale).to(dtype)

    def bf16(self, *shape: int, scale: float = 1.0) -> torch.Tensor:
        """Normal values times scale, bf16."""
        return self.normal(*shape, scale=scale, dtype=torch.bfloat16)

    def integers(self, low: int, high: int, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """Uniform integers low … high - 1."""
        if self._rng is None:
            return self._empty(*shape, dtype=dtype)
        return torch.randint(low, high, shape, generator=self._rng, device=self.device, dtype=dtype)

    def fp8(self, *shape: int) -> torch.Tensor:
        """E4M3 values of every magnitude up to 30, both signs, no NaN."""
        if self._rng is None:
            return self._empty(*shape, dtype=torch.float8_e4m3fn)
        magnitude = self.integers(0, 0x5F, *shape, dtype=torch.uint8)
        return (magnitude | self.integers(0, 2, *shape, dtype=torch.uint8) << 7).view(torch.float8_e4m3fn)

    def e8m0(self, *shape: int, around: int = -10) -> torch.Tensor:
        """Scales 2^(around - 2) … 2^(around + 2)."""
        return self.integers(125 + around, 130 + around, *shape, dtype=torch.uint8).view(torch.float8_e8m0fnu)

    def distinct(self, rows: int, width: int, total: int) -> torch.Tensor:
        """Different slots int32 [rows, width] of 0 … total - 1 in each row, scattered."""
        if self._rng is None:
            return self._empty(rows, width, dtype=torch.int32)
        start = self.integers(0, total, rows, 1, dtype=torch.int64)
        return ((start + torch.arange(width, device=self.device) * 7919) % total).int()

    def kv_pool(self, entries: int, page_size: int) -> torch.Tensor:
        """KV pages that hold `entries` random vectors."""
        pages = -(-entries // page_size)
        # SGLang pads a page to a multiple of 576 bytes.
        stride = -(-kv_page.page_bytes(page_size) // 576) * 576
        pool = torch.zeros(pages, stride, dtype=torch.uint8, device=self.device)
        if self._rng is not None:
            slots = torch.arange(entries, device=self.device)
            kv_page.store(pool, slots, self.bf16(entries, kv_page.DIM), page_size)
        return pool

    def indexer_pool(self, entries: int) -> torch.Tensor:
        """Indexer pages that hold `entries` random keys."""
        pool = torch.zeros(
            -(-entries // C4_PAGE), indexer_page.page_bytes(C4_PAGE), dtype=torch.uint8, device=self.device
        )
        if self._rng is not None:
            slots = torch.arange(entries, device=self.device)
            indexer_page.store(pool, slots, self.normal(entries, indexer_page.DIM), C4_PAGE)
        return pool


def model_calls(
    config: dict[str, Any],
    tp: int,
    rows: int,
    context: int,
    device: torch.device | str = "meta",
    seed: int = 0,
    op: str | None = None,
) -> Iterator[Call]:
    """The calls of one forward pass on one of `tp` ranks.

    Args:
        config: the model's `config.json`.
        rows: tokens of the step.
        context: tokens each row can see.
        op: only the calls of this op.
    """
    make = Inputs(torch.device(device), seed)
    for name, calls in _CALLS.items():
        if op in (None, name):
            for label, arguments in calls(make, config, tp, rows, context):
                yield Call(name, label, arguments)


_Calls = Iterator[tuple[str, dict[str, Any]]]


def fp8_linear_shapes(c: dict[str, Any], tp: int) -> dict[str, tuple[int, int]]:
    """(N, K) of each FP8 linear on one of `tp` ranks."""
    hidden, q_lora, inter = c["hidden_size"], c["q_lora_rank"], c["moe_intermediate_size"]
    shapes = (
        (q_lora + c["head_dim"], hidden),
        (c["num_attention_heads"] * c["head_dim"] // tp, q_lora),
        (hidden, c["o_groups"] * c["o_lora_rank"] // tp),
        (c["index_n_heads"] * c["index_head_dim"], q_lora),
        (2 * inter // tp, hidden),
        (hidden, inter // tp),
        (hidden, hidden),
        (hidden, hidden),
    )
    return dict(zip(FP8_LINEARS, shapes, strict=True))


def _fp8_linear(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    for label, (n, k) in fp8_linear_shapes(c, tp).items():
        # SGLang keeps the scales of linear layers in fp32.
        scale = make.e8m0(-(-n // 128), -(-k // 128)).float()
        # The draft layer projects each token's residual streams.
        inputs = rows * c["hc_mult"] if label == "mtp.h_proj" else rows
        arguments = {"x": make.bf16(inputs, k), "w": make.fp8(n, k), "scale": scale}
        if label.endswith("wq_b"):
            # Columns of the joint projection to queries and keys, whose norm comes first.
            arguments["x"] = make.bf16(rows, k + c["head_dim"])[:, :k]
        if label.endswith("wq_b") or label.startswith("mtp."):
            arguments |= {"norm_weight": make.bf16(k), "eps": c["rms_norm_eps"]}
        yield label, arguments


def _fp8_grouped_linear(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    groups, n = c["o_groups"] // tp, c["o_lora_rank"]
    k = c["num_attention_heads"] * c["head_dim"] // c["o_groups"]
    arguments = {"o": make.bf16(rows, groups, k), "w": make.fp8(groups, n, k)}
    yield "wo_a", {**arguments, "scale": make.e8m0(groups, n // 128, k // 128).float()}


def _bf16_linear_fp32(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    hidden, head, index = c["hidden_size"], c["head_dim"], c["index_head_dim"]
    shapes = {
        "gate": c["n_routed_experts"],
        "compressor.c4": 4 * head,
        "compressor.c128": 2 * head,
        "indexer.compressor": 4 * index,
        "indexer.weights_proj": c["index_n_heads"],
    }
    for label, n in shapes.items():
        arguments = {"x": make.bf16(rows, hidden), "w": make.bf16(n, hidden, scale=hidden**-0.5)}
        yield label, arguments | ({"dtype": torch.bfloat16} if label == "indexer.weights_proj" else {})


def _router_topk(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    experts = c["n_routed_experts"]
    logits = {"router_logits": make.normal(rows, experts), "correction_bias": make.normal(experts)}
    yield "gate", {**logits, "k": c["num_experts_per_tok"], "renormalize": c["norm_topk_prob"]}


def _mxfp4_moe(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    experts, hidden, inter = c["n_routed_experts"], c["hidden_size"], c["moe_intermediate_size"] // tp
    k = c["num_experts_per_tok"]
    yield "experts", {
        "x": make.bf16(rows, hidden),
        "topk_ids": make.distinct(rows, k, experts),
        "topk_weights": make.normal(rows, k).abs(),
        "w13": make.integers(0, 256, experts, 2 * inter, hidden // 2, dtype=torch.uint8),
        "s13": make.e8m0(experts, 2 * inter, hidden // 32, around=-7),
        "w2": make.integers(0, 256, experts, hidden, inter // 2, dtype=torch.uint8),
        "s2": make.e8m0(experts, hidden, inter // 32, around=-7),
        "limit": c["swiglu_limit"],
    }


def _extra(c: dict[str, Any], context: int) -> dict[str, tuple[int, int, int]]:
    """Label: (slots per row, entries in the cache, entries per page) of each layer kind."""
    c4, c128 = max(1, context // 4), max(1, context // 128)
    return {"c4": (c["index_topk"], max(c4, c["index_topk"]), C4_PAGE), "c128": (-(-c128 // 64) * 64, c128, C128_PAGE)}


def _sparse_mla(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    heads, window, head = c["num_attention_heads"] // tp, c["sliding_window"], c["head_dim"]
    tokens = rows + window
    arguments: dict[str, Any] = {
        "q": make.bf16(rows, heads, head),
        "window_pages": make.kv_pool(tokens, WINDOW_PAGE),
        "window_slots": make.distinct(rows, window, tokens),
        "window_lengths": make.integers(min(context, window), min(context, window) + 1, rows),
        "window_page_size": WINDOW_PAGE,
        "sink": make.normal(heads),
        "scale": head**-0.5,
        "freqs_cis": torch.view_as_complex(make.normal(max(rows, context), c["qk_rope_head_dim"] // 2, 2)),
        "positions": make.integers(0, max(rows, context), rows, dtype=torch.int64),
        "q_eps": c["rms_norm_eps"],
    }
    none = dict.fromkeys(("extra_pages", "extra_slots", "extra_lengths", "extra_page_size"))
    yield "window", {**arguments, **none}
    for label, (width, entries, page_size) in _extra(c, context).items():
        live = min(width, max(1, context // (4 if label == "c4" else 128)))
        yield (
            label,
            {
                **arguments,
                "extra_pages": make.kv_pool(entries, page_size),
                "extra_slots": make.distinct(rows, width, entries),
                "extra_lengths": make.integers(live, live + 1, rows),
                "extra_page_size": page_size,
            },
        )


def _gather_dequant_kv(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    for label, (width, entries, page_size) in _extra(c, context).items():
        yield (
            label,
            {
                "pages": make.kv_pool(entries, page_size),
                "slots": make.distinct(rows, width, entries),
                "lengths": make.integers(0, width + 1, rows),
                "page_size": page_size,
            },
        )


def _page_table(make: Inputs, rows: int, entries: int) -> dict[str, torch.Tensor]:
    pages = -(-entries // C4_PAGE)
    return {
        "page_table": make.distinct(rows, pages, pages),
        "lengths": make.integers(entries, entries + 1, rows),
    }


def _indexer(make: Inputs, c: dict[str, Any], rows: int, entries: int) -> dict[str, Any]:
    heads = c["index_n_heads"]
    return {
        "q": make.fp8(rows, heads, c["index_head_dim"]),
        "weights": make.normal(rows, heads),
        "pages": make.indexer_pool(entries),
        **_page_table(make, rows, entries),
        "page_size": C4_PAGE,
    }


def _indexer_logits(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    yield "c4", _indexer(make, c, rows, max(1, context // 4))


def _indexer_topk(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    yield "c4", {**_indexer(make, c, rows, max(1, context // 4)), "k": c["index_topk"]}


def _topk_slots(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    entries = max(1, context // 4)
    table = _page_table(make, rows, entries)
    logits = make.normal(rows, table["page_table"].shape[1] * C4_PAGE)
    for k in (512, 1024):
        yield f"k{k}", {"logits": logits, **table, "k": k, "page_size": C4_PAGE}


def _mixing(make: Inputs, c: dict[str, Any], parts: int) -> dict[str, torch.Tensor]:
    """fn, scale and base of one mixing: `parts` scales, 24 mixes at 3, 4 at 1."""
    mixes, width = (24, 4 * c["hidden_size"]) if parts == 3 else (4, 4 * c["hidden_size"])
    return {
        "fn": make.normal(mixes, width, scale=width**-0.5),
        "scale": make.normal(parts),
        "base": make.normal(mixes),
    }


def _pre(make: Inputs, c: dict[str, Any]) -> dict[str, Any]:
    return {**_mixing(make, c, 3), "norm_weight": make.bf16(c["hidden_size"])}


def _post(make: Inputs, c: dict[str, Any], rows: int) -> dict[str, torch.Tensor]:
    hidden = c["hidden_size"]
    return {
        "f": make.bf16(rows, hidden),
        "x": make.bf16(rows, 4, hidden),
        "post": make.normal(rows, 4).sigmoid() * 2,
        "comb": make.normal(rows, 4, 4).softmax(-1),
    }


def _mhc_pre(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    yield "block", {"x": make.bf16(rows, 4, c["hidden_size"]), **_pre(make, c)}


def _mhc_post(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    yield "block", dict(_post(make, c, rows))


def _mhc_post_pre(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    yield "block", {**_post(make, c, rows), **_pre(make, c)}


def _mhc_head(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    yield "head", {"x": make.bf16(rows, 4, c["hidden_size"]), **_mixing(make, c, 1)}


def _sinkhorn(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> _Calls:
    mixing = {"mixes": make.normal(rows, 24), "scale": make.normal(3), "base": make.normal(24)}
    yield "block", {**mixing, "iters": c["hc_sinkhorn_iters"], "eps": c["hc_eps"]}


_CALLS = {
    "fp8_linear": _fp8_linear,
    "fp8_grouped_linear": _fp8_grouped_linear,
    "bf16_linear_fp32": _bf16_linear_fp32,
    "router_topk": _router_topk,
    "mxfp4_moe": _mxfp4_moe,
    "sparse_mla": _sparse_mla,
    "gather_dequant_kv": _gather_dequant_kv,
    "indexer_logits": _indexer_logits,
    "indexer_topk": _indexer_topk,
    "topk_slots": _topk_slots,
    "mhc_pre": _mhc_pre,
    "mhc_post": _mhc_post,
    "mhc_post_pre": _mhc_post_pre,
    "mhc_head": _mhc_head,
    "sinkhorn": _sinkhorn,
}
