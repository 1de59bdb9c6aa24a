"""Cases of `fp8_grouped_linear`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.formats import e8m0
from sglang_sm120.tolerance import BF16

from .common import Case, Maker


def cases(kind: str) -> Iterator[Case]:
    """An input that is a slice of wider rows; the model's shapes on a GPU."""

    def build(make: Maker, tokens: int, groups: int, n: int, k: int, fp32_scale: bool) -> dict[str, Any]:
        weights = [make.fp8_weight(n, k) for _ in range(groups)]
        scale = torch.stack([e8m0.scale_bytes(s) for _, s in weights])
        return {
            "o": make.bf16(tokens, 2 * groups * k)[:, groups * k :].unflatten(1, (groups, k)),
            "w": torch.stack([w.view(torch.uint8) for w, _ in weights]).view(torch.float8_e4m3fn),
            "scale": e8m0.to_float(scale) if fp32_scale else e8m0.from_bytes(scale),
        }

    sizes = [
        (0, 2, 128, 128),
        (1, 2, 128, 256),
        (3, 1, 200, 130),
        (16, 2, 40, 256),
        (40, 2, 40, 1024),
        (40, 2, 128, 2048),
        (70, 2, 128, 128),
        (70, 2, 40, 256),
    ]
    if kind != "cpu":
        c, rows = model_config(), (1, 2, 4, 8, 16, 33, 64, 65, 300)
        width = c["num_attention_heads"] * c["head_dim"] // c["o_groups"]
        sizes += [(t, c["o_groups"] // tp, c["o_lora_rank"], width) for tp in (1, 2, 4) for t in rows]
    for t, groups, n, k in sizes:
        for fp32_scale in (False, True):
            name = f"{t}x{groups}x{k}-to-{n}" + ("-fp32-scale" if fp32_scale else "")
            yield Case(name, BF16, partial(build, tokens=t, groups=groups, n=n, k=k, fp32_scale=fp32_scale))
