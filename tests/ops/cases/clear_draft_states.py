"""Cases of `clear_draft_states`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from sglang_sm120.ops.clear_draft_states import Layers
from sglang_sm120.tolerance import EXACT

from .common import Case, Maker


def written(inputs: dict[str, Any], result: None) -> Any:
    """The layers' states, and the poisoned rows before and behind them where there are."""
    assert result is None
    base = inputs["layers"].states[0]._base
    return list(inputs["layers"].states) if base is None else base


def cases(kind: str) -> Iterator[Case]:
    """Halves of no power of two, rings that a verification goes round, no request, none or all accepted."""

    def build(make: Maker, requests: int, layers: int = 3, ring: int = 16, half: int = 6, nodes: int = 4,
              accepted: int | None = None, index: torch.dtype = torch.int64) -> dict[str, Any]:  # fmt: skip
        rings = requests + 2
        guarded = make.poisoned(layers, rings * ring + 2, 2 * half, dtype=torch.float32)
        guarded[:, 1:-1] = make.normal(layers, rings * ring, 2 * half)
        guarded[:, 5::7] = torch.nan
        lens = make.integers(0, nodes + 1, requests) if accepted is None else make.tensor([accepted] * requests)
        return {
            "layers": Layers.of(list(guarded[:, 1:-1])),
            "req_pool_indices": make.choice(rings, requests).to(index),
            "seq_lens": make.integers(0, 5 * ring, requests, dtype=index),
            "accept_lens": lens,
            "ring_size": ring,
            "num_draft_tokens": nodes,
        }

    def odd(make: Maker) -> dict[str, Any]:
        """Rows of which only each second is aligned."""
        arguments = build(make, 5)
        return arguments | {"layers": Layers.of([make.normal(7 * 16, 10), make.normal(7 * 16, 10)])}

    def case(name: str, *sizes: Any, **options: Any) -> Case:
        return Case(name, EXACT, lambda make: build(make, *sizes, **options), written, ("layers",))

    yield case("one", 1, layers=1)
    yield case("no-request", 0)
    yield case("some", 7)
    yield case("int32", 7, index=torch.int32)
    yield case("the-models", 3, layers=20, ring=256, half=512)
    yield case("all-of-a-ring", 4, ring=10, nodes=10)
    yield case("all-accepted", 4, accepted=4)
    yield case("none-accepted", 4, accepted=0)
    yield case("more-accepted", 4, accepted=9)
    yield Case("odd-half", EXACT, odd, written, ("layers",))
