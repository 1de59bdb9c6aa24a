"""One suite for every op and provider, over the ops' own case lists.

The torch reference is held against `naive`, every other provider against the torch reference, or what it says its own
arithmetic is. An op without cases of its own is called as a pass of one row of the real model calls it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from functools import partial
from typing import Any

import naive
import pytest
import torch
from cases.common import Case, Maker

from sglang_sm120 import kernels, ops, registry, tuned
from sglang_sm120.checkpoint.config import model_config
from sglang_sm120.tolerance import BF16, EXACT, Tolerance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KIND = registry.device_kind(DEVICE)
# Longer tensors are the ones that lie past 2^31 bytes; comparing all of one would touch all of it.
COMPARED_BYTES = 1 << 28


def op_cases(name: str) -> list[Case]:
    if importlib.util.find_spec(f"cases.{name}"):
        return list(importlib.import_module(f"cases.{name}").cases(KIND))

    of_model = partial(ops.calls, name, model_config(), 8, 1, 128)

    def build(make: Maker, label: str) -> dict[str, Any]:
        (found,) = (call for call in of_model(make.device, 0) if call.label == label)
        return found.arguments

    tolerance = EXACT if ops.SPECS[name].exact else BF16
    return [Case(call.label, tolerance, partial(build, label=call.label)) for call in of_model()]


def parameters() -> Iterator[Any]:
    for name in sorted(ops.SPECS):
        for case in op_cases(name):
            for provider in registry.ops()[name].providers.values():
                here = registry._matches(provider.runs_on, KIND)
                if here and (provider.name != registry.TORCH or hasattr(naive, name)):
                    yield pytest.param(name, provider.name, case, id=f"{name}-{case.name}-{provider.name}")


def run(case: Case, seed: int, function: Any) -> tuple[dict[str, Any], Any]:
    inputs = case.build(Maker(seed, DEVICE))
    return inputs, case.observe(inputs, function(**inputs))


def tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for item in value for t in tensors(item)] if isinstance(value, tuple | list) else []


def assert_close(got: torch.Tensor, expected: torch.Tensor, tolerance: Tolerance) -> None:
    assert got.shape == expected.shape
    got, expected = got.double().cpu(), expected.double().cpu()
    special = ~expected.isfinite()
    # NaN marks memory that must still be poison, -inf an absent entry.
    torch.testing.assert_close(got[special], expected[special], rtol=0, atol=0, equal_nan=True)
    got, expected = got[~special], expected[~special]
    assert got.isfinite().all()
    if expected.numel():
        error = (got - expected).abs()
        assert error.square().mean().sqrt() <= tolerance.rms * expected.square().mean().sqrt()
        assert error.max() <= tolerance.largest * expected.abs().max()


IMPRECISE = Tolerance(2e-3, 1e-2)
"""Of 33 terms each sum of FP8 tensor cores may drop what lies 2^-13 below the largest, and four sums make a dot."""


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in op_cases("indexer_logits")])
def test_index_scores_with_fp8_operands(case: Case, seed: int) -> None:
    """In the interpreter they differ from fp16 operands in nothing, on a GPU as its tensor cores sum."""
    op = registry.ops()["indexer_logits"]
    inputs = case.build(Maker(seed, DEVICE))
    (table,) = ops.SPECS[op.name].trials({"page_size": 64} | inputs).values()
    launched: list[Any] = []
    with kernels.rehearse(kernels.Rehearsal(lambda *launch: launched.append(launch[2]), 8)), tuned.using(table):
        op.by("triton", **inputs)
    assert [options["FP8"] for options in launched] == [True]
    with tuned.using(table):
        got = op.by("triton", **inputs)
    assert_close(got, op.reference(**inputs), case.tolerance if KIND == "cpu" else IMPRECISE)


def test_every_op_has_cases_and_a_naive_twin() -> None:
    assert set(ops.SPECS) == set(registry.ops())
    for name in ops.SPECS:
        assert callable(getattr(naive, name)) and importlib.util.find_spec(f"cases.{name}")
        assert len({case.name for case in op_cases(name)}) == len(op_cases(name)) > 0


@pytest.mark.parametrize(("name", "provider", "case"), list(parameters()))
def test_parity(name: str, provider: str, case: Case, seed: int) -> None:
    op = registry.ops()[name]
    function = partial(op.by, provider)
    inputs, got = run(case, seed, function)
    _, expected = run(case, seed, getattr(naive, name) if provider == registry.TORCH else partial(op.meant, provider))
    own = op.providers[provider].own
    got, expected = tensors(got), tensors(expected)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, own.tolerance if own else case.tolerance)

    untouched = case.build(Maker(seed, DEVICE))
    for argument in untouched.keys() - set(case.mutates):
        for before, after in zip(tensors(untouched[argument]), tensors(inputs[argument]), strict=True):
            if before.untyped_storage().nbytes() < COMPARED_BYTES:
                assert torch.equal(before.contiguous().view(torch.uint8), after.contiguous().view(torch.uint8)), (
                    argument
                )

    if KIND == "cpu" and provider != registry.TORCH:
        return  # the interpreter runs one program after the other: a second run cannot differ
    _, again = run(case, seed, function)
    for a, b in zip(got, tensors(again), strict=True):
        assert torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
