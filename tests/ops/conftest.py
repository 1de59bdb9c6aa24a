"""Poisoned scratch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases.common import POISON

from sglang_sm120 import kernels


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
