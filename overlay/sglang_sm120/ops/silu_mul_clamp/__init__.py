"""Clamped SwiGLU activation of the shared expert."""

from __future__ import annotations

import torch

from ...registry import Op


@Op
def silu_mul_clamp(gate_up: torch.Tensor, limit: float) -> torch.Tensor:
    """silu(min(gate, limit)) · clamp(up, ±limit) for gate_up bf16 [T, 2N] = gate | up; returns bf16 [T, N].

    The clamp acts on bf16 values, the rest is fp32, rounded once.
    """
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=limit).float(), up.clamp(-limit, limit).float()
    return (torch.nn.functional.silu(gate) * up).to(gate_up.dtype)
