"""SGLang's own CUDA kernel as a provider of `silu_mul_clamp`."""

from __future__ import annotations

import torch

from . import silu_mul_clamp


@silu_mul_clamp.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def silu_mul_clamp_sglang(gate_up: torch.Tensor, limit: float) -> torch.Tensor:
    from sglang.kernels.ops.activation.silu_and_mul_clamp import silu_and_mul_clamp

    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    silu_and_mul_clamp(gate_up, out, limit)
    return out
