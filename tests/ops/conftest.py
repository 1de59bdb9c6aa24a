"""Poisoned scratch, and one thread: threads that wait for each other take most of the time on two cores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases.common import POISON

from sglang_sm120 import kernels


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def poisoned_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scratch holds NaN and the largest integers, for what an earlier call left there may be anything."""
    scratch = kernels.scratch

    def poisoned(*arguments: Any) -> list[torch.Tensor]:
        tensors = scratch(*arguments)
        for tensor in tensors:
            if tensor.dtype == torch.int32:
                tensor.fill_(torch.iinfo(torch.int32).max)
            else:
                tensor.view(torch.uint8).fill_(POISON)
        return tensors

    monkeypatch.setattr(kernels, "scratch", poisoned)
