"""The mixture of experts of one layer: gate, routing, routed experts and the shared one."""

from __future__ import annotations

import torch

from .. import ops
from ..formats.experts import Nvfp4Experts
from ..streams import SHARED, Beside
from .weights import Experts


def experts(e: Experts, x: torch.Tensor, input_ids: torch.Tensor, beside: Beside) -> torch.Tensor:
    """This rank's part of the experts' output for x bf16 [T, H], to be summed over the ranks: bf16 [T, H].

        y = shared(x) + factor Σ_e weight_e expert_e(x), chosen by a table of tokens (hash layers) or by the gate
    """
    logits = ops.bf16_linear_fp32(x, e.gate)
    if e.tid2eid is not None:
        weights, ids = ops.hash_topk(logits, input_ids, e.tid2eid)
    else:
        weights, ids = ops.router_topk(logits, e.bias, e.topk)
    # Not from the start: the gate and the router are short, and would wait for SMs and memory beside it.
    chosen = beside.mark()
    if isinstance(e.weights, Nvfp4Experts):
        routed = ops.nvfp4_moe(x, local(ids, e), weights, *e.weights, e.limit)
    else:
        routed = ops.mxfp4_moe(x, local(ids, e), weights, *e.weights, e.limit)
    with beside.on(SHARED, chosen):
        hidden = ops.silu_mul_clamp(ops.fp8_linear(x, *e.shared_gate_up), e.limit)
        shared = ops.fp8_linear(hidden, *e.shared_down)
    beside.join()
    # The router's factor is applied here and nowhere else.
    return torch.add(shared, routed, alpha=e.factor)


def local(ids: torch.Tensor, e: Experts) -> torch.Tensor:
    """The experts' numbers on this rank, -1 for another rank's (expert parallelism)."""
    if e.owned == e.gate.shape[0]:
        return ids
    mine = ids - e.first
    return torch.where((mine >= 0) & (mine < e.owned), mine, -1)
