"""Other implementations of `indexer_topk`."""

from __future__ import annotations

from baselines import GEMM, Arguments, Baseline, Run
from baselines.indexer_logits import deep_gemm_logits
from baselines.topk_slots import sglang_topk
from sglang_sm120.tolerance import EXACT


def _deep_gemm_indexer(a: Arguments) -> Run:
    score, choose = deep_gemm_logits(a), sglang_topk(a)
    return lambda: choose(score())


OTHERS = [
    Baseline("deep_gemm", "fp8_paged_mqa_logits + topk_transform_paged_v2, plans made outside",
             _deep_gemm_indexer, EXACT, GEMM, compiles=True),
]  # fmt: skip
