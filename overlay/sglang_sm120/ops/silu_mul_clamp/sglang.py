"""SGLang's own CUDA kernel as a provider of `silu_mul_clamp`."""

from __future__ import annotations

import torch

from ...registry import Arguments
from . import silu_mul_clamp


@silu_mul_clamp.provider("sglang", runs_on="sm90+", default_on="sm120 sm121")
def silu_mul_clamp_sglang(a: Arguments) -> torch.Tensor:
    from sglang.kernels.ops.activation.silu_and_mul_clamp import silu_and_mul_clamp

    out = a.gate_up.new_empty(a.gate_up.shape[0], a.gate_up.shape[1] // 2)
    silu_and_mul_clamp(a.gate_up, out, a.limit)
    return out
