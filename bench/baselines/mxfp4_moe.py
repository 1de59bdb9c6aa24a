"""Other implementations of `mxfp4_moe`."""

from __future__ import annotations

import torch

from baselines import BF16_STEPS, Arguments, Baseline, Run
from sglang_sm120.formats import mxfp4

_marlin_weights: tuple[torch.Tensor, torch.nn.Module] | None = None


def _marlin_layer(a: Arguments) -> torch.nn.Module:
    """The experts in Marlin's layout, kept for the next call with the same weights."""
    from sglang.srt.layers.quantization.marlin_utils_fp4 import prepare_moe_mxfp4_layer_for_marlin

    global _marlin_weights
    if _marlin_weights is None or _marlin_weights[0] is not a["w13"]:
        _marlin_weights = None
        layer = torch.nn.Module()
        # Gate first, scales row-major.
        inter = a["w13"].shape[1] // 2
        s13, s2 = (mxfp4.unswizzle_scales(a[name].view(torch.uint8)) for name in ("s13", "s2"))
        given = {"w13_weight": a["w13"].view(torch.int8).roll(inter, 1), "w2_weight": a["w2"].view(torch.int8)}
        given |= {"w13_weight_scale": s13.roll(inter, 1).view(torch.float8_e8m0fnu)}
        given |= {"w2_weight_scale": s2.view(torch.float8_e8m0fnu)}
        for name, value in given.items():
            setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
        prepare_moe_mxfp4_layer_for_marlin(layer)
        _marlin_weights = (a["w13"], layer)
    return _marlin_weights[1]


def _marlin(a: Arguments) -> Run:
    from sglang.srt.layers.moe.fused_moe_triton.fused_marlin_moe import fused_marlin_moe

    layer = _marlin_layer(a)
    return lambda: fused_marlin_moe(
        hidden_states=a["x"],
        w1=layer.w13_weight,
        w2=layer.w2_weight,
        w1_scale=layer.w13_weight_scale,
        w2_scale=layer.w2_weight_scale,
        gating_output=a["topk_weights"],
        topk_weights=a["topk_weights"],
        topk_ids=a["topk_ids"],
        workspace=layer.workspace,
        num_bits=4,
        clamp_limit=a["limit"],
    )


OTHERS = [
    Baseline("marlin", "SGLang's Marlin MXFP4 MoE", _marlin, BF16_STEPS, ("sglang",), compiles=True),
]  # fmt: skip
