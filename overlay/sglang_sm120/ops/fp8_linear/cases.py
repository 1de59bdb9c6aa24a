"""Cases of `fp8_linear`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from ...formats import e8m0
from .._cases import BF16, Case, Maker, model_config


def model_shapes(tp: int) -> list[tuple[int, int]]:
    """(N, K) of every FP8 linear of the model on one of tp ranks."""
    c = model_config()
    hidden, q_lora, inter = c["hidden_size"], c["q_lora_rank"], c["moe_intermediate_size"]
    return [
        (q_lora + c["head_dim"], hidden),
        (c["num_attention_heads"] * c["head_dim"] // tp, q_lora),
        (hidden, c["o_groups"] * c["o_lora_rank"] // tp),
        (c["index_n_heads"] * c["index_head_dim"], q_lora),
        (2 * inter // tp, hidden),
        (hidden, inter // tp),
    ]


def cases(kind: str) -> Iterator[Case]:
    """Partial blocks, both scale dtypes, leading dimensions; the model's shapes on a GPU."""

    def build(make: Maker, shape: tuple[int, ...], n: int, fp32_scale: bool = False) -> dict[str, Any]:
        w, scale = make.fp8_weight(n, shape[-1])
        return {"x": make.bf16(*shape), "w": w, "scale": e8m0.to_float(scale) if fp32_scale else scale}

    shapes: list[tuple[tuple[int, ...], int]] = [
        ((0, 128), 128),
        ((1, 128), 128),
        ((3, 200), 300),
        ((2, 3, 256), 128),
        ((70, 256), 130),
    ]
    if kind != "cpu":
        shapes += [((t, k), n) for tp in (1, 2, 4) for n, k in model_shapes(tp) for t in (1, 8, 300)]
    for shape, n in shapes:
        for fp32_scale in (False, True):
            name = "x".join(map(str, shape)) + f"-to-{n}{'-fp32-scale' if fp32_scale else ''}"
            yield Case(name, BF16, partial(build, shape=shape, n=n, fp32_scale=fp32_scale))
