"""What the step takes over from a loaded model: FP8 `wo_a`, and experts in SM120's layout."""

from __future__ import annotations

import logging
from typing import Any

import torch

from .formats import experts as layout
from .formats import fp8_block
from .step import weights

logger = logging.getLogger(__name__)


def prepare(model: Any) -> list[weights.Layer]:
    """`weights.read` of every layer of a target or MTP model, in the form that the step needs.

    `wo_a`, which SGLang holds in bf16, becomes FP8; one that is not made of FP8 blocks stays as it is. Experts that
    SGLang has in another layout are replaced in its module, one layer after the other.

    Raises:
        AttributeError, ValueError: as `weights.read`; also experts that have no exact form in that layout.
    """
    layers = [_prepare(module) for module in weights.layers_of(model)]
    if kept := sum(isinstance(layer.attention.wo_a, torch.Tensor) for layer in layers):
        logger.warning("sglang_sm120: wo_a of %d layers is not made of FP8 blocks and stays bf16.", kept)
    return layers


def _prepare(module: Any) -> weights.Layer:
    layer = weights.read(module)
    a, e = layer.attention, layer.experts
    kept = e.weights
    if kept.s13.dtype == torch.float32:
        kept = layout.from_gate_first(*kept)
        for name, tensor in zip(weights.EXPERTS, kept, strict=True):
            getattr(module.mlp.experts, name).data = tensor
    wo_a = _grouped(module.self_attn.wo_a.weight, a.groups)
    return layer._replace(attention=a._replace(wo_a=wo_a), experts=e._replace(weights=kept))


def _grouped(wo_a: torch.Tensor, groups: int) -> weights.Linear | torch.Tensor:
    sizes = (groups, -1)
    try:
        weight, scale = fp8_block.requantise(wo_a)
    except fp8_block.NotBlocks:
        return wo_a.unflatten(0, sizes)
    return weights.Linear(weight.unflatten(0, sizes), scale.unflatten(0, sizes))
