"""Every Triton kernel against what it is to give, at the real model's shapes, and under CUDA-graph replay."""

from __future__ import annotations

import pytest
import torch

from sglang_sm120 import ops, registry
from sglang_sm120.checkpoint.config import FLASH, PRO, RANKS
from sglang_sm120.parity import LONGEST, calls_of, compare, replay

ROWS = (1, 2, 4, 8, 16, 33, 64, 65, 256, 4096)
STEPS = [(rows, 65_536 if rows < 4096 else 4096) for rows in ROWS]
STEPS += [(1, context) for context in (100, 2047, 2600, LONGEST)]
OPS = [*ops.with_triton(), *ops.with_own()]


def here(name: str) -> tuple[str, str]:
    """Op and provider; one with arithmetic of its own is skipped where it does not run."""
    op, provider = ops.named(name)
    found = registry.ops()[op].providers[provider]
    why = registry.refusal(found, registry.device_kind(torch.device("cuda", 0)))
    if found.own and why:
        pytest.skip(why)
    return op, provider


@pytest.mark.parametrize(("model", "tp"), RANKS)
@pytest.mark.parametrize(("rows", "context"), STEPS)
@pytest.mark.parametrize("name", OPS)
def test_parity(name: str, rows: int, context: int, model: str, tp: int, seed: int) -> None:
    op, provider = here(name)
    calls = calls_of(op, tp, rows, context, seed, model)
    found = [(call.label, compare(call, provider).problem) for call in calls]
    torch.cuda.empty_cache()
    assert not [(label, problem) for label, problem in found if problem]


@pytest.mark.parametrize("rows", (1, 4, 32, 64, 128))
@pytest.mark.parametrize(("model", "tp"), ((FLASH, 2), (PRO, 8)))
@pytest.mark.parametrize("name", OPS)
def test_graph_replay_is_bit_equal(name: str, model: str, tp: int, rows: int, seed: int) -> None:
    op, provider = here(name)
    for call in calls_of(op, tp, rows, 8192, seed, model):
        problem = replay(call, seed, provider)
        assert problem is None, f"{call.label}, {problem}"
