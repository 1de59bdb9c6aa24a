"""SGLang's own CUDA kernel as a provider of `hash_topk`."""

from __future__ import annotations

import torch

from . import hash_topk


@hash_topk.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def hash_topk_sglang(
    router_logits: torch.Tensor, input_ids: torch.Tensor, tid2eid: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    from sglang.kernels.ops.moe.dsv4 import hash_topk as kernel

    return kernel(router_logits, input_ids, tid2eid)
