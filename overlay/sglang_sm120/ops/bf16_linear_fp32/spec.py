"""The model's calls of `bf16_linear_fp32`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

import torch

from ...spec import Arguments, Calls, Inputs, Spec
from .._linear_spec import others, traffic


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    hidden, head, index = c["hidden_size"], c["head_dim"], c["index_head_dim"]
    shapes = {
        "gate": c["n_routed_experts"],
        "compressor.c4": 4 * head,
        "compressor.c128": 2 * head,
        "indexer.compressor": 4 * index,
        "indexer.weights_proj": c["index_n_heads"],
    }
    for label, n in shapes.items():
        arguments = {"x": make.bf16(rows, hidden), "w": make.bf16(n, hidden, scale=hidden**-0.5)}
        yield label, arguments | ({"dtype": torch.bfloat16} if label == "indexer.weights_proj" else {})


def _traffic(a: Arguments) -> tuple[int, int]:
    moved, operations = traffic(a)
    return moved if "dtype" in a else moved + 2 * a["x"].shape[0] * a["w"].shape[0], operations


SPEC = Spec(
    calls=_calls,
    traffic=_traffic,
    tunables={"linear": others},
    served=True,
    streams=3,
    prefill="cuBLAS",
)
