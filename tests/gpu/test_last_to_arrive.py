"""Kernels whose last program to arrive does the rest, where a GPU decides who that is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sglang_sm120 import kernels
from sglang_sm120.ops.router_topk import triton as router
from sglang_sm120.ops.sparse_mla import triton as attention
from sglang_sm120.parity import DEVICE, calls_of, triton_result, worst
from sglang_sm120.spec import Call

REPLAYS = 1000


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched."""
    launch, names = kernels.launch, []

    def noted(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *args, **options)

    monkeypatch.setattr(kernels, "launch", noted)
    return names


def assert_replays_alike(call: Call, expected: list[torch.Tensor]) -> None:
    """In a graph of two such calls, the second as far beside the first as dependent launches let it."""
    kernels.reset()
    kernels.reserve(call.op, 64 << 20, DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        triton_result(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = [triton_result(call), triton_result(call)]
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    for _ in range(REPLAYS):
        for tensor in sum(captured, []):
            tensor.view(torch.uint8).fill_(0xFF)
        graph.replay()
        for found in captured:
            for a, b in zip(found, expected, strict=True):
                wrong += (a.view(torch.uint8) != b.view(torch.uint8)).sum()
    assert not wrong.item()
    with torch.cuda.stream(stream):
        assert not kernels.counters(call.op, expected[0].device, 1).any()


@pytest.mark.parametrize("rows", (1, 2, 4, 8, 16))
def test_the_gate_chooses_alike_in_one_launch_and_in_two(
    rows: int, launched: list[str], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (call,) = calls_of("router_topk", 2, rows, 8192, seed)
    # Sums that do round.
    call.arguments["x"].copy_(torch.randn(call.arguments["x"].shape, device=DEVICE))
    monkeypatch.setattr(router, "WARPS_AT_ONCE", 0)
    expected = triton_result(call)
    assert launched == ["_gemv", "_route"]
    launched.clear()
    # More than run at once, too.
    monkeypatch.setattr(router, "WARPS_AT_ONCE", 1 << 20)
    assert_replays_alike(call, expected)
    assert launched == ["_gemv_route"] * 3


@pytest.mark.parametrize("rows", (1, 64))
def test_attention_merges_a_few_parts_by_itself(
    rows: int, launched: list[str], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = 0
    for call in calls_of("sparse_mla", 2, rows, 8192, seed):
        launched.clear()
        expected = triton_result(call)
        if launched != ["_attend"]:
            continue
        with monkeypatch.context() as apart:
            apart.setattr(attention, "MERGED_PARTS", 1)
            merged = triton_result(call)
        if launched == ["_attend", "_attend", "_merge"]:
            fused += 1
            # Which adds the parts as a tree.
            assert worst(call.op, expected, merged).problem is None
            assert_replays_alike(call, expected)
    assert fused
