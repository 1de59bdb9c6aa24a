"""What the step takes over from a loaded model: FP8 `wo_a`, and experts in SM120's layout."""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

import torch

from .. import ops
from ..formats import experts as layout
from ..formats import fp8_block
from . import weights

logger = logging.getLogger(__name__)

ROWS = 8 * fp8_block.BLOCK

_scales: dict[int, torch.Tensor] = {}
"""Scales of each FP8 `wo_a` that SGLang's module holds instead of its own, by the weight's address."""


def prepare(model: Any) -> list[weights.Layer]:
    """`weights.read` of every layer of a target or MTP model, in the form that the step needs.

    `wo_a`, which SGLang holds in bf16, becomes FP8; one that is not made of FP8 blocks stays as it is. In a patched
    SGLang, whose own forward takes FP8 too (`fp8_wo_a`), it replaces the bf16 one. Experts that SGLang has in another
    layout are replaced in its module. Layer by layer, so that one alone is there in both forms.

    Raises:
        AttributeError, ValueError: as `weights.read`; also experts that have no exact form in that layout.
    """
    replaces = patched()
    layers = [_prepare(module, replaces) for module in weights.layers_of(model)]
    if kept := sum(isinstance(layer.attention.wo_a, torch.Tensor) for layer in layers):
        logger.warning("sglang_sm120: wo_a of %d layers is not made of FP8 blocks and stays bf16.", kept)
    return layers


def patched() -> bool:
    """Whether this SGLang's own forward multiplies by an FP8 `wo_a` through `fp8_wo_a`."""
    return hasattr(import_module("sglang.srt.models.deepseek_v4"), "fp8_wo_a")


def fp8_wo_a(o: torch.Tensor, wo_a: torch.Tensor) -> torch.Tensor:
    """o bf16 [T, G, K] @ wo_a e4m3 [G, N, K], a view of a weight that `prepare` has put into SGLang's module.

    Returns bf16 [T, G, N].
    """
    return ops.fp8_grouped_linear(o, wo_a, _scales[wo_a.data_ptr()])


def _prepare(module: Any, replaces: bool) -> weights.Layer:
    layer = weights.read(module)
    a, e = layer.attention, layer.experts
    kept = _up_first(module.mlp.experts, e.weights)
    attention = module.self_attn
    wo_a = _grouped(attention.wo_a.weight, a.groups)
    if replaces and isinstance(wo_a, weights.Linear):
        attention.wo_a.weight.data, _scales[wo_a.weight.data_ptr()] = wo_a.weight.flatten(0, 1), wo_a.scale
        # SGLang's kernel with the inverse RoPE takes bf16.
        attention.use_fused_wo_a = False
    return layer._replace(attention=a._replace(wo_a=wo_a), experts=e._replace(weights=kept))


def _up_first(module: Any, kept: layout.Experts | layout.Nvfp4Experts) -> layout.Experts | layout.Nvfp4Experts:
    """A layer's experts in SM120's layout, in SGLang's module too."""
    if isinstance(kept, layout.Nvfp4Experts):
        if weights.up_first(module):
            return kept
        kept, names = layout.nvfp4_from_gate_first(kept), weights.NVFP4
        module.sglang_sm120_up_first = True
    elif kept.s13.dtype == torch.float32:
        kept, names = layout.from_gate_first(*kept), weights.EXPERTS
    else:
        return kept
    for name, tensor in zip(names, kept, strict=True):
        getattr(module, name).data = tensor
    return kept


def _grouped(wo_a: torch.Tensor, groups: int) -> weights.Linear | torch.Tensor:
    sizes = (groups, -1)
    try:
        # In parts, whose fp32 copies are small beside a layer.
        parts = [fp8_block.requantise(rows) for rows in wo_a.split(ROWS)]
    except fp8_block.NotBlocks:
        return wo_a.unflatten(0, sizes)
    weight, scale = map(torch.cat, zip(*parts, strict=True))
    return weights.Linear(weight.unflatten(0, sizes), scale.unflatten(0, sizes))
