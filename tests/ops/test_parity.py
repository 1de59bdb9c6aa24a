"""One suite for every op and provider, over the ops' own case lists.

The torch reference is held against `naive`, every other provider against the torch reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases.common import Case, Maker
from naive import NAIVE

from sglang_sm120 import ops, registry
from sglang_sm120.tolerance import Tolerance

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KIND = registry.device_kind(DEVICE)
# Longer tensors are the ones that lie past 2^31 bytes; comparing all of one would touch all of it.
COMPARED_BYTES = 1 << 28


def op_cases(name: str) -> list[Case]:
    module = importlib.import_module(f"cases.{name}")
    return list(module.cases(KIND))


def parameters() -> Iterator[Any]:
    for name in sorted(ops.__all__):
        for case in op_cases(name):
            for provider in registry.ops()[name].providers.values():
                if registry.runs_on(provider, KIND):
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


def test_every_op_has_cases_and_a_naive_twin() -> None:
    assert set(ops.__all__) == set(registry.ops()) == set(NAIVE)
    for name in ops.__all__:
        assert len({case.name for case in op_cases(name)}) == len(op_cases(name)) > 0


@pytest.mark.parametrize(("name", "provider", "case"), list(parameters()))
def test_parity(name: str, provider: str, case: Case, seed: int) -> None:
    op = registry.ops()[name]
    function = op.providers[provider].function
    inputs, got = run(case, seed, function)
    _, expected = run(case, seed, NAIVE[name] if provider == registry.TORCH else op.reference)
    got, expected = tensors(got), tensors(expected)
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, case.tolerance)

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
