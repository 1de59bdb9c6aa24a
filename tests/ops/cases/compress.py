"""Cases of `compress`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sglang_sm120.formats.compress_plan import Ring
from sglang_sm120.ops.compress_decode_plan import compress_decode_plan
from sglang_sm120.ops.compress_prefill_plan import compress_prefill_plan
from sglang_sm120.tolerance import FP32

from .common import Case, Maker
from .compress_prefill_plan import mapping


def cases(kind: str) -> Iterator[Case]:
    """Prefill and decode of both ratios, from the start and resumed; padded plans and a caller's result.

    Ring rows that no planned block reads are NaN.
    """

    def build(
        make: Maker,
        ratio: int,
        pairs: list[tuple[int, int]],
        decode: bool = False,
        padded: bool = False,
        out: bool = False,
        head_dim: int = 128,
    ) -> dict[str, Any]:
        ring_size = 8 if ratio == 4 else 128
        width = (4 if ratio == 4 else 2) * head_dim
        lengths = make.tensor([s for s, _ in pairs], torch.int64)
        where = mapping(make, len(pairs))
        tokens = sum(e for _, e in pairs)
        plans: tuple[torch.Tensor, ...]
        if decode:
            plans = (compress_decode_plan.reference(ratio, seq_lens=lengths, ring_size=ring_size, **where),)
        else:
            extend = make.tensor([e for _, e in pairs], torch.int64)
            plans = compress_prefill_plan.reference(
                ratio, seq_lens=lengths, extend_lens=extend, ring_size=ring_size, **where
            )
        if padded:
            plans = tuple(torch.cat((p, make.poisoned(2, p.shape[1]))) for p in plans)
        rings = len(where["full_to_swa"]) // where["swa_page_size"] if ratio == 4 else len(pairs)
        ring = make.poisoned(rings * ring_size // ratio, ratio, width, dtype=torch.float32)
        places = Ring(ratio, where["req_to_token"], where["full_to_swa"], where["swa_page_size"], ring_size)
        for request, (seq_len, extend) in zip(where["req_pool_indices"], pairs, strict=True):
            before = torch.arange(max(0, seq_len - extend - places.window), seq_len - extend, device=make.device)
            row = places.row(request.expand(len(before)), before)
            ring[row // ratio, row % ratio] = make.normal(len(before), width)
        arguments = {
            "kv_score_buffer": ring,
            "kv_score_input": make.normal(tokens, width),
            "ape": make.normal(8 if ratio == 4 else 128, head_dim),
            "plans": plans,
            "is_decode": decode,
            "head_dim": head_dim,
            "ratio": ratio,
        }
        if out:
            arguments["out"] = make.poisoned(len(plans[0]), head_dim, dtype=torch.float32)
        return arguments

    def case(name: str, ratio: int, pairs: list[tuple[int, int]], **options: Any) -> Case:
        return Case(
            f"c{ratio}-{name}",
            FP32,
            lambda make: build(make, ratio, pairs, **options),
            lambda inputs, result: (result, inputs["kv_score_buffer"]),
            ("kv_score_buffer", "out"),
        )

    for ratio in (4, 128):
        yield case("first", ratio, [(1, 1), (4, 4), (9, 9), (300, 300)])
        yield case("resumed", ratio, [(5, 1), (260, 5), (385, 129), (640, 128)])
        yield case("padded", ratio, [(140, 20)], padded=True)
        yield case("out", ratio, [(140, 20)], out=True)
        decoded = [(1, 1), (3, 1), (4, 1), (8, 1), (128, 1), (257, 1), (512, 1)]
        yield case("decode", ratio, decoded, decode=True)
        yield case("decode-out", ratio, decoded, decode=True, out=True)
    yield case("dim-512", 4, [(9, 9)], head_dim=512)
