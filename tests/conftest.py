"""Fixtures that every test folder shares."""

from __future__ import annotations

import os
import zlib

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined, so before a test imports one: without a GPU they run in Triton's interpreter.
    os.environ["TRITON_INTERPRET"] = "1"
    # Here and in every server that a test starts: products are small, and threads that share their cores with a
    # neighbour wait for each other.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

# The same values in every run, as with `seed`; a machine that pauses is no failure.
hypothesis.settings.register_profile("drawn", derandomize=True, deadline=None)
hypothesis.settings.load_profile("drawn")


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that belongs to this test and its parameters, the same in every run."""
    return zlib.crc32(request.node.nodeid.encode())


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-shapes", action="store_true", help="compile every shape of the real model, not a sample")
    parser.addoption("--fuzzed", type=int, default=320, help="how many requests the fuzz test sends to its server")
