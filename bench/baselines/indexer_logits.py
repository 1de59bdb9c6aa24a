"""Other implementations of `indexer_logits`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from baselines import FP8_SUMS, Arguments, Baseline, Run
from sglang_sm120.tolerance import FP32


def deep_gemm_logits(a: Arguments) -> Callable[[], torch.Tensor]:
    import deep_gemm

    size, table, q = a["page_size"], a["page_table"], a["q"].unsqueeze(1)
    pages = a["pages"].view(-1, size, 1, a["pages"].shape[1] // size)
    lengths = a["lengths"].int().unsqueeze(1)
    plan = deep_gemm.get_paged_mqa_logits_metadata(lengths, size, deep_gemm.get_num_sms())
    width = table.shape[1] * size
    return lambda: deep_gemm.fp8_paged_mqa_logits(q, pages, a["weights"], lengths, table, plan, width, False)


def _sglang_torch_logits(a: Arguments) -> Run:
    from sglang.srt.layers.attention.dsv4.indexer import fp8_paged_mqa_logits_torch

    size, table, q = a["page_size"], a["page_table"], a["q"].unsqueeze(1)
    pages = a["pages"].view(-1, size, 1, a["pages"].shape[1] // size)
    width = table.shape[1] * size
    return lambda: fp8_paged_mqa_logits_torch(q, pages, a["weights"], a["lengths"], table, None, width, False)


OTHERS = [
    Baseline("deep_gemm", "fp8_paged_mqa_logits, its plan made outside", deep_gemm_logits,
             FP8_SUMS, ("deep_gemm",), compiles=True),
    Baseline("sglang_torch", "fp8_paged_mqa_logits_torch, a loop over rows", _sglang_torch_logits,
             FP32, ("sglang",), captured=False),
]  # fmt: skip
