"""SGLang's own CUDA kernel as a provider of `hash_topk`."""

from __future__ import annotations

import torch

from ...registry import Arguments
from . import hash_topk


@hash_topk.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def hash_topk_sglang(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    from sglang.kernels.ops.moe.dsv4 import hash_topk as kernel

    return kernel(a.router_logits, a.input_ids, a.tid2eid)
