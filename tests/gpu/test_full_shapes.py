"""Every Triton kernel against its torch reference, at the real model's shapes, and under CUDA-graph replay."""

from __future__ import annotations

import pytest
import torch

from calls import DEVICE, calls_of, compare, triton_result
from sglang_sm120 import kernels, ops

ROWS = (1, 2, 4, 8, 16, 33, 64, 65, 256, 4096)
STEPS = [(rows, 65_536 if rows < 4096 else 4096) for rows in ROWS]
STEPS += [(1, context) for context in (100, 2047, 2600, 1_048_576)]


@pytest.mark.parametrize("tp", (1, 2, 4))
@pytest.mark.parametrize(("rows", "context"), STEPS)
@pytest.mark.parametrize("op", ops.with_triton())
def test_parity(op: str, rows: int, context: int, tp: int, seed: int) -> None:
    problems = {call.label: problem for call in calls_of(op, tp, rows, context, seed) if (problem := compare(call))}
    torch.cuda.empty_cache()
    assert not problems


@pytest.mark.parametrize("rows", (1, 4, 32, 64, 128))
@pytest.mark.parametrize("op", ops.with_triton())
def test_graph_replay_is_bit_equal(op: str, rows: int, seed: int) -> None:
    for call in calls_of(op, 2, rows, 8192, seed):
        kernels.reset()
        with kernels.rehearse(kernels.Rehearsal(lambda *_: None, kernels.multiprocessors(DEVICE))) as rehearsal:
            triton_result(call)
        for owner, size in rehearsal.scratch.items():
            kernels.reserve(owner, size, torch.device("cuda", 0))
        stream = torch.cuda.Stream()
        # It reads what the other stream has made.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            triton_result(call)  # compiles
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = triton_result(call)
        rng = torch.Generator(DEVICE).manual_seed(seed)
        changing = [name for name in call.arguments if name.endswith("lengths")] + ["topk_ids"]
        for _ in range(8):
            for name in changing:
                value = call.arguments.get(name)
                if value is not None:
                    high = int(value.max()) + 1
                    value.copy_(torch.randint(0, max(high, 1), value.shape, generator=rng, device=DEVICE))
            for name in ("page_table", "slots", "window_slots", "extra_slots"):
                value = call.arguments.get(name)
                if value is not None:
                    value.copy_(value.roll(1 + seed % 5, dims=1))
            disturbance = [torch.full((size,), torch.nan, device=DEVICE) for size in (1 << 20, 1000, 1 << 24)]
            del disturbance
            for tensor in captured:
                tensor.view(torch.uint8).fill_(0xFF)
            graph.replay()
            torch.cuda.synchronize()
            for a, b in zip(captured, triton_result(call), strict=True):
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8)), call.label
