"""Other implementations of the ops that run on the same GPU: what the benchmark times beside ours.

Those of an op are the `OTHERS` of the module of its name, if there is one.
Each is called as SGLang 0.5.23 calls it. Weight conversion and what SGLang plans once a step happen in `prepare`;
what it does at every call, such as quantising activations to FP8, is part of the timed callable. Before it is timed,
its result is compared with the op's reference (`problem_of`), on the first rows, so that 4,096 rows cost no minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch

from calls import ROWS_COMPARED, sample
from sglang_sm120 import ops, registry
from sglang_sm120.parity import difference, reference_result, tensors
from sglang_sm120.spec import Call
from sglang_sm120.tolerance import EXACT, Tolerance

Arguments = dict[str, Any]
Run = Callable[[], Any]
FP8_ACTIVATIONS = Tolerance(0.05, 0.1)
"""E4M3 rounds an activation by up to 2^-4, 2.6 % in the mean, and so the sums; the largest of many by thrice that."""
TF32 = Tolerance(5e-3, 2e-2)
"""TF32 keeps 10 bits of the mixing products, and bf16 rounds the result at another place by up to 2^-8."""
BF16_STEPS = Tolerance(1e-2, 3e-2)
"""Gate, up and each expert's output are rounded to bf16 (2^-9 each) where the reference keeps fp32."""
FP8_SUMS = Tolerance(2e-3, 1e-2)
"""Hopper's tensor cores keep some 14 bits of a sum of FP8 products."""
CUBLAS = Tolerance(1e-4, 1e-3)
"""The tensor cores of Hopper truncate the terms of an fp32 sum."""
CHOSEN_ELSEWHERE = 0.01
"""Share of chosen slots that may differ: entries next to the k-th whose scores round the other way."""


def _as_given(arguments: Arguments) -> Arguments:
    return arguments


class Baseline(NamedTuple):
    """One other implementation of an op.

    prepare(arguments) converts weights and plans, and returns what is timed. computes(arguments) are the arguments
    for which the reference gives the same result. compiles: its first call builds kernels. lowered: it is Triton code,
    so SM120 lowering applies to it as to ours. captured: it can be captured in a CUDA graph.
    """

    name: str
    note: str
    prepare: Callable[[Arguments], Run]
    tolerance: Tolerance
    needs: tuple[str, ...] = ()
    computes: Callable[[Arguments], Arguments] = _as_given
    compiles: bool = False
    lowered: bool = False
    captured: bool = True
    op: str = ""

    def available(self) -> str | None:
        """None, or why it cannot run here."""
        missing = [name for name in self.needs if find_spec(name) is None]
        return f"{', '.join(missing)} not installed" if missing else None


def problem_of(baseline: Baseline, call: Call, result: Any) -> str | None:
    """None, or how the first rows of the baseline's `result` differ from the reference's."""
    part, got = sample(call), [t[:ROWS_COMPARED] for t in tensors(result)]
    if of_choice := ops.SPECS[call.op].problem:
        return of_choice(baseline.computes(part.arguments), *got)
    expected = reference_result(Call(call.op, call.label, baseline.computes(part.arguments)))
    if len(got) != len(expected):
        return f"it gives {len(got)} tensors and the op {len(expected)}"
    for a, b in zip(got, expected, strict=True):
        if problem := _choice_problem(a, b) if b.dtype == torch.int32 else _values_problem(a, b, baseline.tolerance):
            return problem
    return None


def _values_problem(got: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> str | None:
    if got.shape == expected.shape:
        # Beyond a row's length upstream's scores are whatever was there, and nobody reads them.
        got = torch.where(expected.isfinite(), got, expected)
    return difference(got, expected, tolerance).problem


def _choice_problem(got: torch.Tensor, expected: torch.Tensor) -> str | None:
    """Whether both choose the same slots or experts, in any order, near ties apart."""
    if got.shape != expected.shape:
        return f"it chooses {list(got.shape)} and the op {list(expected.shape)}"
    rows = list(zip(got.tolist(), expected.tolist(), strict=True))
    same, wanted = sum(len({*a} & {*b}) for a, b in rows), sum(len({*b}) for _, b in rows)
    if same < (1 - CHOSEN_ELSEWHERE) * wanted:
        return f"{1 - same / wanted:.1%} of its choices differ (allowed {CHOSEN_ELSEWHERE:.0%})"
    return None


def without(*names: str) -> Callable[[Arguments], Arguments]:
    return lambda a: {name: value for name, value in a.items() if name not in names}


REFERENCE = "torch"
SLOW = ("marlin", "tilelang")
"""Built for minutes at their first call: only on request."""
QUANTISES = "activations quantised to FP8 inside the timing, as SGLang does"
GEMM = ("deep_gemm", "sglang")


def _torch_baseline(op: str) -> Baseline:
    def prepare(a: Arguments) -> Run:
        return lambda: registry.ops()[op].reference(**a)

    captured = not ops.SPECS[op].synchronises
    return Baseline(REFERENCE, "this project's reference", prepare, EXACT, captured=captured, op=op)


def _others(op: str) -> list[Baseline]:
    if find_spec(f"{__name__}.{op}") is None:
        return []
    return [baseline._replace(op=op) for baseline in import_module(f"{__name__}.{op}").OTHERS]


def names() -> list[str]:
    """Names of all baselines, the slow ones last."""
    found = dict.fromkeys([REFERENCE, *(b.name for op in ops.SPECS for b in _others(op))])
    return sorted(found, key=lambda name: name in SLOW)


def baselines(op: str, chosen: list[str]) -> list[Baseline]:
    """The chosen baselines of an op."""
    return [b for b in [*_others(op), _torch_baseline(op)] if b.name in chosen]
