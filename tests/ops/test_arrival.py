"""Kernels whose last program to arrive does the rest: whoever that is, the result has the same bits.

Triton's interpreter runs one program after the other, here in any order. Where a GPU chooses it:
`tests/gpu/test_last_to_arrive.py`.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases.common import Maker
from cases.router_topk import cases as router_cases
from cases.sparse_mla import cases as attention_cases
from triton.runtime.interpreter import interpreter_builder

from sglang_sm120 import kernels, registry
from sglang_sm120.parity import tensors

CPU = torch.device("cpu")
FUSED = {
    "router_topk": [case for case in router_cases("cpu") if case.name in ("rows-1", "rows-5")],
    "sparse_mla": [case for case in attention_cases("cpu") if case.name in ("several-blocks", "few-parts")],
}
CASES = [pytest.param(op, case, id=f"{op}-{case.name}") for op, cases in FUSED.items() for case in cases]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched."""
    launch, names = kernels.launch, []

    def noted(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(kernels, "launch", noted)
    return names


def shuffle(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Have the interpreter run the programs of every launch in an order that the seed decides."""
    rng, order, set_grid_idx = random.Random(seed), [], interpreter_builder.set_grid_idx

    def shuffled(x: int, y: int, z: int) -> None:
        nx, ny, nz = interpreter_builder.grid_dim
        if not (x or y or z):
            order[:] = range(nx * ny * nz)
            rng.shuffle(order)
        place = order[(x * ny + y) * nz + z]
        set_grid_idx(place // (ny * nz), place // nz % ny, place % nz)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", shuffled)


@pytest.mark.skipif(torch.cuda.is_available(), reason="no interpreter where kernels are compiled")
@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_order_of_arrival_does_not_matter(
    op: str, case: Any, launched: list[str], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bits() -> list[list[int]]:
        result = registry.ops()[op].by("triton", **case.build(Maker(seed, CPU)))
        # Whatever a kernel leaves there, the next call starts from.
        assert not kernels.counters(op, CPU, 1).any()
        return [tensor.view(torch.uint8).flatten().tolist() for tensor in tensors(result)]

    in_order = bits()
    assert len(launched) == 1, launched
    for more in range(3):
        with monkeypatch.context() as shuffled:
            shuffle(shuffled, seed + more)
            assert bits() == in_order


def test_counters_are_zero_and_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each op on each stream others, none of which begins in a capture."""
    zeros, taken = torch.zeros, []

    def take(*shape: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        taken.append(zeros(*shape, dtype=dtype))
        return taken[-1]

    def on(stream: int, capturing: bool = False) -> None:
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=stream))
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)

    monkeypatch.setattr(kernels, "_counters", {})
    monkeypatch.setattr(kernels.torch, "zeros", take)
    cuda = torch.device("cuda", 0)
    found = []
    for stream, capturing, op in ((7, False, "a"), (8, False, "a"), (7, False, "b"), (7, True, "a"), (8, True, "a")):
        on(stream, capturing)
        found.append(kernels.counters(op, cuda, kernels.COUNTERS))
    assert [tensor.data_ptr() for tensor in found] == [tensor.data_ptr() for tensor in (*taken, *taken[:2])]
    assert len(taken) == 3 and not any(tensor.any() for tensor in taken)
    with pytest.raises(kernels.ScratchError, match="op b first runs on this stream inside a capture"):
        kernels.counters("b", cuda, 1)
    with pytest.raises(kernels.ScratchError, match="asks for 4097 counters and there are 4096"):
        kernels.counters("a", cuda, kernels.COUNTERS + 1)
