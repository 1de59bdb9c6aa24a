"""Tests that need a CUDA device; on a Hopper card the kernels are lowered as for SM120."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(HERE) and "needs_no_gpu" not in item.keywords:
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_no_gpu: a test of the harness itself")
    if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9:
        if os.environ.get("SM120_LOWERING", "1") == "1":
            from sm120_lowering import install

            install()
        torch.backends.cuda.matmul.allow_tf32 = False
