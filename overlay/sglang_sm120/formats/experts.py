"""A layer's routed experts as SGLang keeps them for SM120, which is how `ops.mxfp4_moe` takes them.

    w13  uint8|int8 [E, 2 I, H / 2]              packed as in `formats.mxfp4`; I rows of w3 (up), then I of w1 (gate)
    s13  float8_e8m0fnu|uint8 [E, 2 I, H / 32]   each expert's scale bytes, swizzled as in `formats.mxfp4`
    w2   uint8|int8 [E, H, I / 2]
    s2   float8_e8m0fnu|uint8 [E, H, I / 32]     swizzled too

H and I are multiples of 128, which SGLang's own kernels ask for as well; I is what a tensor-parallel rank has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from . import e8m0, mxfp4

MULTIPLE = 128
"""Of which H and I are multiples: a swizzled tile has 128 rows, and four scales cover 128 channels."""


class Experts(NamedTuple):
    """The four tensors of a layer, in the order in which `ops.mxfp4_moe` takes them."""

    w13: torch.Tensor
    s13: torch.Tensor
    w2: torch.Tensor
    s2: torch.Tensor


def refusal(w13: torch.Tensor, s13: torch.Tensor, w2: torch.Tensor, s2: torch.Tensor) -> str | None:
    """Why the four tensors cannot be a layer's experts: one sentence; None if they can."""
    experts, hidden, inter = w2.shape[0], w2.shape[1], w2.shape[2] * 2
    wrong = hidden % MULTIPLE or inter % MULTIPLE
    if wrong or not hidden or not inter:
        return (
            f"experts have {hidden} channels and {inter} inside, and swizzled scales need multiples of {MULTIPLE}; "
            "pad the checkpoint, or use fewer tensor-parallel ranks."
        )
    needed = {
        "w13": (w13, (experts, 2 * inter, hidden // 2)),
        "s13": (s13, (experts, 2 * inter, hidden // mxfp4.BLOCK)),
        "s2": (s2, (experts, hidden, inter // mxfp4.BLOCK)),
    }
    for name, (tensor, shape) in needed.items():
        if tensor.shape != shape:
            return f"{name} is {list(tensor.shape)} and needs {list(shape)}, as w2 is {list(w2.shape)}."
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
