"""Other implementations of `topk_slots`."""

from __future__ import annotations

from collections.abc import Callable

import torch

from baselines import Arguments, Baseline, Run
from sglang_sm120.tolerance import EXACT


def sglang_topk(a: Arguments) -> Callable[[torch.Tensor], torch.Tensor]:
    from sglang.kernels.ops.attention.dsv4.topk import plan_topk_v2, topk_transform_paged_v2

    lengths, table = a["lengths"].int(), a["page_table"]
    plan = plan_topk_v2(lengths)

    def choose(logits: torch.Tensor) -> torch.Tensor:
        slots = torch.empty(logits.shape[0], a["k"], dtype=torch.int32, device=logits.device)
        topk_transform_paged_v2(logits, lengths, table, slots, a["page_size"], plan)
        return slots

    return choose


def _sglang_topk_slots(a: Arguments) -> Run:
    choose = sglang_topk(a)
    return lambda: choose(a["logits"])


def _sglang_torch_topk(a: Arguments) -> Run:
    from sglang.srt.layers.attention.dsv4.indexer import topk_transform_pytorch_vectorized

    slots = torch.empty(a["logits"].shape[0], a["k"], dtype=torch.int32, device=a["logits"].device)

    def run() -> torch.Tensor:
        topk_transform_pytorch_vectorized(a["logits"], a["lengths"], a["page_table"], slots, a["page_size"])
        return slots

    return run


OTHERS = [
    Baseline("sglang_cuda", "topk_transform_paged_v2, its plan made outside", _sglang_topk_slots, EXACT,
             ("sglang",), compiles=True),
    Baseline("sglang_torch", "topk_transform_pytorch_vectorized", _sglang_torch_topk, EXACT,
             ("sglang",), captured=False),
]  # fmt: skip
