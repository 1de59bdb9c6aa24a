"""SGLang's own CUDA kernel as a provider of `compress`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ...registry import Arguments
from . import compress


def sglangs_plan(ratio: int, plans: Sequence[torch.Tensor], is_decode: bool) -> Any:
    """Plans as `ops.compress` takes them, as SGLang's kernels do."""
    from sglang.kernels.ops.attention.dsv4.compress import CompressorDecodePlan, CompressorPrefillPlan

    return CompressorDecodePlan(ratio, *plans) if is_decode else CompressorPrefillPlan(ratio, *plans)


@compress.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def compress_sglang(a: Arguments) -> torch.Tensor:
    from sglang.kernels.ops.attention.dsv4.compress import compress_forward

    return compress_forward(
        kv_score_buffer=a.kv_score_buffer,
        kv_score_input=a.kv_score_input,
        ape=a.ape,
        plan=sglangs_plan(a.ratio, a.plans, a.is_decode),
        compress_ratio=a.ratio,
        head_dim=a.head_dim,
        out=a.out,
    )
