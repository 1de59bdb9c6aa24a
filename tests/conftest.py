"""Fixtures that every test folder shares."""

from __future__ import annotations

import zlib

import pytest


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that belongs to this test and its parameters, the same in every run."""
    return zlib.crc32(request.node.nodeid.encode())
