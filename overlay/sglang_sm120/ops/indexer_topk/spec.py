"""The model's call of `indexer_topk`, and what the tools know of it."""

from __future__ import annotations

from typing import Any

from ...spec import Calls, Inputs, Spec
from ..indexer_logits.spec import SPEC as LOGITS
from ..indexer_logits.spec import arguments, traffic
from ..topk_slots.spec import SPEC as SLOTS


def _calls(make: Inputs, c: dict[str, Any], tp: int, rows: int, context: int) -> Calls:
    yield "c4", {**arguments(make, c, rows, context), "k": c["index_topk"]}


SPEC = Spec(
    calls=_calls,
    traffic=traffic,
    aim=lambda a, rows, context: ("time_us", 15.0) if rows == 1 and context == 65_536 else None,
    tunables={**LOGITS.tunables, **SLOTS.tunables},
    served=True,
    context=1,
    scores="indexer_logits",
    synchronises=True,
    prefill="TileLang scores, then SGLang's CUDA top-k",
)
