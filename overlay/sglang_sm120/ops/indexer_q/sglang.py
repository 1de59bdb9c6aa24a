"""SGLang's own CUDA kernel as a provider of `indexer_q`."""

from __future__ import annotations

import torch

from ...registry import Arguments
from . import indexer_q


@indexer_q.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def indexer_q_sglang(a: Arguments) -> tuple[torch.Tensor, torch.Tensor]:
    from sglang.kernels.ops.attention.dsv4.norm_rope import fused_q_indexer_rope_hadamard_quant

    return fused_q_indexer_rope_hadamard_quant(a.q, a.weight, a.weight_scale, a.freqs_cis, a.positions)
