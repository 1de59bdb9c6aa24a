"""The model's call of `nvfp4_moe`, where its experts are NVFP4, and what the tools know of it."""

from __future__ import annotations

from typing import Any

import torch

from ...checkpoint.config import nvfp4_experts
from ...formats import mxfp4, nvfp4
from ...spec import Calls, Inputs, Spec
from ..mxfp4_moe import spec as mxfp4_moe
from .triton import FAMILIES


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    for label, a in mxfp4_moe.calls(make, c, tp, rows, context):
        for name in ("s13", "s2"):
            *rows_of, blocks = a[name].shape
            # 0.5 to 3.75.
            bits = make.integers(0x30, 0x50, *rows_of, blocks * mxfp4.BLOCK // nvfp4.BLOCK, dtype=torch.uint8)
            a[name] = bits.view(torch.float8_e4m3fn)
        experts = len(a["w2"])
        a["g13"], a["g2"] = (make.normal(experts, *more, scale=2.0**-8).abs() for more in ((2,), ()))
        yield label, a


SPEC = Spec(
    calls=_calls,
    traffic=mxfp4_moe.traffic,
    aim=mxfp4_moe.aim,
    tunables=mxfp4_moe.tunables(FAMILIES),
    served=True,
    where=nvfp4_experts,
    by_experts=True,
    synchronises=True,
)
