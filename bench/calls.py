"""Comparing the first rows of a result alone, so that 4,096 rows cost no minutes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sglang_sm120 import ops
from sglang_sm120.parity import reference_result, selection_problem, tensors, worst
from sglang_sm120.spec import Call

ROWS_COMPARED = 64
ROW_ARGUMENTS = frozenset(
    "x q o f post comb mixes topk_ids topk_weights weights page_table lengths logits slots router_logits positions "
    "window_slots window_lengths extra_slots extra_lengths temperature noise".split()
)
"""Arguments whose first dimension is the rows of the step, or of `temperature` its requests."""


def sample(call: Call, rows: int = ROWS_COMPARED) -> Call:
    """The call with its first `rows` rows."""
    of_rows = {
        name: value
        for name, value in call.arguments.items()
        if name in ROW_ARGUMENTS and isinstance(value, torch.Tensor)
    }
    all_rows = max([rows, *map(len, of_rows.values())])
    return Call(
        call.op,
        call.label,
        call.arguments | {name: value[: len(value) * rows // all_rows] for name, value in of_rows.items()},
    )


def checker(call: Call) -> Callable[[Any], str | None]:
    """Compares a result's first rows with the reference's, which are computed once: None, or how they differ."""
    part = sample(call)
    if ops.SPECS[call.op].scores:
        return lambda result: selection_problem(part, tensors(result)[0][:ROWS_COMPARED])
    if problem := ops.SPECS[call.op].problem:
        return lambda result: problem(part.arguments, *(t[:ROWS_COMPARED] for t in tensors(result)))
    expected = reference_result(part)
    return lambda result: worst(call.op, [t[:ROWS_COMPARED] for t in tensors(result)], expected).problem
