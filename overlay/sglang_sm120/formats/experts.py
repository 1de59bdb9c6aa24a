"""A layer's routed experts as SGLang keeps them for SM120, which is how `ops.mxfp4_moe` and `ops.nvfp4_moe` take them.

    w13  uint8|int8 [E, 2 I, H / 2]              packed as in `formats.mxfp4`; I rows of w3 (up), then I of w1 (gate)
    s13  float8_e8m0fnu|uint8 [E, 2 I, H / 32]   each expert's scale bytes, swizzled as in `formats.mxfp4`
    w2   uint8|int8 [E, H, I / 2]
    s2   float8_e8m0fnu|uint8 [E, H, I / 32]     swizzled too

NVFP4 experts have float8_e4m3fn scales for 16 channels, s13 [E, 2 I, H / 16] and s2 [E, H, I / 16], swizzled as well,
and

    g13  fp32 [E, 2]   factors of w1 (gate) and w3 (up), in this order, which is not that of the rows
    g2   fp32 [E]

H and I are multiples of 128, which SGLang's own kernels ask for as well; I is what a tensor-parallel rank has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import e8m0, mxfp4, nvfp4

MULTIPLE = 128
"""Of which H and I are multiples: a swizzled tile has 128 rows, and four scales cover 128 channels."""


class Experts(NamedTuple):
    """The four tensors of a layer, in the order in which `ops.mxfp4_moe` takes them."""

    w13: torch.Tensor
    s13: torch.Tensor
    w2: torch.Tensor
    s2: torch.Tensor


class Nvfp4Experts(NamedTuple):
    """The six tensors of a layer of NVFP4, in the order in which `ops.nvfp4_moe` takes them."""

    w13: torch.Tensor
    s13: torch.Tensor
    g13: torch.Tensor
    w2: torch.Tensor
    s2: torch.Tensor
    g2: torch.Tensor


def refusal(
    w13: torch.Tensor, s13: torch.Tensor, w2: torch.Tensor, s2: torch.Tensor, block: int = mxfp4.BLOCK
) -> str | None:
    """Why the four tensors, with a scale for `block` channels, cannot be a layer's: one sentence; None if they can."""
    experts, hidden, inter = w2.shape[0], w2.shape[1], w2.shape[2] * 2
    wrong = hidden % MULTIPLE or inter % MULTIPLE
    if wrong or not hidden or not inter:
        return (
            f"experts have {hidden} channels and {inter} inside, and swizzled scales need multiples of {MULTIPLE}; "
            "pad the checkpoint, or use fewer tensor-parallel ranks."
        )
    needed = {
        "w13": (w13, (experts, 2 * inter, hidden // 2)),
        "s13": (s13, (experts, 2 * inter, hidden // block)),
        "s2": (s2, (experts, hidden, inter // block)),
    }
    for name, (tensor, shape) in needed.items():
        if tensor.shape != shape:
            return f"{name} is {list(tensor.shape)} and needs {list(shape)}, as w2 is {list(w2.shape)}."
    return None


def nvfp4_refusal(e: Nvfp4Experts) -> str | None:
    """Why the six tensors cannot be a layer's NVFP4 experts: one sentence; None if they can."""
    if why := refusal(e.w13, e.s13, e.w2, e.s2, nvfp4.BLOCK):
        return why
    needed = {
        "s13": (e.s13, e.s13.shape, torch.float8_e4m3fn),
        "s2": (e.s2, e.s2.shape, torch.float8_e4m3fn),
        "g13": (e.g13, (len(e.w2), 2), torch.float32),
        "g2": (e.g2, (len(e.w2),), torch.float32),
    }
    for name, (tensor, shape, dtype) in needed.items():
        if tensor.shape != shape or tensor.dtype != dtype:
            return f"{name} is {tensor.dtype} {list(tensor.shape)} and needs {dtype} {list(shape)}."
    return None


def from_gate_first(w13: torch.Tensor, s13: torch.Tensor, w2: torch.Tensor, s2: torch.Tensor) -> Experts:
    """A layer as SGLang keeps it on CPU, to SM120's.

    There w13 has w1 (gate) first, and the scales are row-major fp32, s13 [E, 2 I, H / 32] and s2 [E, H, I / 32].
    w2 is returned as it is, the others are new.

    Raises ValueError if a scale is no power of two, or for shapes that `refusal` names.
    """
    why = refusal(w13, s13, w2, s2)
    if why is not None:
        raise ValueError(why)
    inter = w13.shape[1] // 2
    s13, s2 = (mxfp4.swizzle_scales(e8m0.from_float(scale)) for scale in (s13.roll(inter, 1), s2))
    return Experts(w13.roll(inter, 1), s13, w2, s2)


def nvfp4_from_gate_first(e: Nvfp4Experts) -> Nvfp4Experts:
    """A layer as SGLang keeps it with --moe-runner-backend flashinfer_mxfp4, to the order of rows that SM120's has.

    There w13 and the swizzled s13 have w1 (gate) first. w13 and s13 are returned new, the others as they are.

    Raises ValueError for what `nvfp4_refusal` names.
    """
    if why := nvfp4_refusal(e):
        raise ValueError(why)
    inter = e.w13.shape[1] // 2
    # I is a multiple of a tile's 128 rows, so that tiles of scales move as rows do.
    s13 = e.s13.view(torch.uint8).roll(inter, 1).view(e.s13.dtype)
    return e._replace(w13=e.w13.roll(inter, 1), s13=s13)
