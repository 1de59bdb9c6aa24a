"""Running and comparing the ops on the real model's calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from sglang_sm120 import ops, registry
from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.spec import Call
from sglang_sm120.tolerance import BF16, EXACT, FP32, Tolerance

DEVICE = torch.device("cuda")
ROWS_COMPARED = 64
ROW_ARGUMENTS = frozenset(
    "x q o f post comb mixes topk_ids topk_weights weights page_table lengths logits slots router_logits positions "
    "window_slots window_lengths extra_slots extra_lengths".split()
)
"""Arguments whose first dimension is the rows of the step."""


def calls_of(op: str, tp: int, rows: int, context: int, seed: int) -> Iterator[Call]:
    """The model's calls of one op, with random values on the GPU."""
    return ops.calls(op, model_config(), tp, rows, context, DEVICE, seed)


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, tuple | list) else []


def triton_result(call: Call) -> list[torch.Tensor]:
    return tensors(registry.ops()[call.op].by("triton", **call.arguments))


def reference_result(call: Call) -> list[torch.Tensor]:
    return tensors(registry.ops()[call.op].reference(**call.arguments))


def poison_allocator(nbytes: int = 1 << 28) -> None:
    """Fill memory that the next allocations get with NaN."""
    block = torch.full((nbytes // 4,), torch.nan, device=DEVICE)
    del block


def compare(call: Call) -> str | None:
    """None, or how the Triton result differs from the reference's."""
    poison_allocator()
    got = triton_result(call)
    if ops.SPECS[call.op].scores:
        return selection_problem(call, got[0])
    expected = reference_result(call)
    return _first_difference(call.op, got, expected)


def _first_difference(op: str, got: list[torch.Tensor], expected: list[torch.Tensor]) -> str | None:
    for a, b in zip(got, expected, strict=True):
        tolerance = EXACT if ops.SPECS[op].exact else FP32 if b.dtype == torch.float32 else BF16
        if problem := difference(a, b, tolerance):
            return problem
    return None


def sample(call: Call, rows: int = ROWS_COMPARED) -> Call:
    """The call with its first `rows` rows."""
    cut = {
        name: value[:rows] if name in ROW_ARGUMENTS and isinstance(value, torch.Tensor) else value
        for name, value in call.arguments.items()
    }
    return Call(call.op, call.label, cut)


def checker(call: Call) -> Callable[[Any], str | None]:
    """Compares a result's first rows with the reference's, which are computed once: None, or how they differ."""
    part = sample(call)
    if ops.SPECS[call.op].scores:
        return lambda result: selection_problem(part, tensors(result)[0][:ROWS_COMPARED])
    expected = reference_result(part)
    return lambda result: _first_difference(call.op, [t[:ROWS_COMPARED] for t in tensors(result)], expected)


def difference(got: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> str | None:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return f"{got.dtype} {list(got.shape)} and needs {expected.dtype} {list(expected.shape)}"
    got, expected = got.float(), expected.float()
    finite = expected.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return f"{int((got.isfinite() != finite).sum())} values are not finite where they should be, or the reverse"
    error = (got - expected)[finite]
    rms, largest = error.square().mean().sqrt().item(), error.abs().max().item()
    allowed_rms = tolerance.rms * expected[finite].square().mean().sqrt().item()
    allowed = tolerance.largest * expected[finite].abs().max().item()
    if rms > allowed_rms or largest > allowed:
        return f"RMS error {rms:.2e} (allowed {allowed_rms:.2e}), largest {largest:.2e} (allowed {allowed:.2e})"
    return None


def selection_problem(call: Call, slots: torch.Tensor) -> str | None:
    """Whether `slots` are k best entries of each row by the reference's scores, near ties apart."""
    arguments = {name: value for name, value in call.arguments.items() if name != "k"}
    logits = registry.ops()[ops.SPECS[call.op].scores].reference(**arguments)
    k, page_size, table = call.arguments["k"], call.arguments["page_size"], call.arguments["page_table"]
    # Page ids of a row are different, so a slot names its entry.
    entry_of = torch.full((table.shape[0], int(table.max()) + 1), -1, device=DEVICE)
    entry_of.scatter_(1, table.long(), torch.arange(table.shape[1], device=DEVICE).expand_as(table))
    live = slots >= 0
    entry = entry_of.gather(1, (slots.clamp(min=0) // page_size).long()) * page_size + slots.clamp(min=0) % page_size
    length = call.arguments["lengths"].clamp(max=k)
    if not torch.equal(live.sum(1), length.to(torch.int64)):
        return "a row has another number of slots than entries it may choose"
    ascending = entry.masked_fill(~live, torch.iinfo(torch.int64).max)
    if not (ascending[:, 1:] >= ascending[:, :-1]).all() or not live.long().diff(dim=1).le(0).all():
        return "slots are not in ascending order of their entries"
    # Absent slots are marked in a column of their own.
    width = logits.shape[1]
    marks = torch.zeros(logits.shape[0], width + 1, dtype=torch.bool, device=DEVICE)
    chosen = marks.scatter_(1, entry.masked_fill(~live, width), True)[:, :width]
    if not torch.equal(chosen.sum(1), length.to(torch.int64)):
        return "a slot is listed twice"
    worst = logits.masked_fill(~chosen, torch.inf).amin(1)
    best_rejected = logits.masked_fill(chosen, -torch.inf).amax(1)
    # fp32 sums over 64 heads in another order.
    slack = 1e-5 * logits.masked_fill(~logits.isfinite(), 0).abs().amax(1)
    if (best_rejected > worst + slack).any():
        return "a rejected entry scores higher than a chosen one"
    return None
