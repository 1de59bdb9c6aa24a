"""Whole prompts in one prefill chunk, against the oracle."""

from __future__ import annotations

import pytest
from prompts import LONG, random_prompt
from serving import CachedOracle, ask, assert_equal
from sglang_sm120.local_server import LocalServer

SERVER_ARGS = ("--chunked-prefill-size", "4096")


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 2047])
def test_prefill(server: LocalServer, oracle: CachedOracle, tokens: int, seed: int) -> None:
    assert_equal(ask(server, random_prompt(tokens, seed), new_tokens=4), oracle)


def test_long_prefill(server: LocalServer, oracle: CachedOracle) -> None:
    assert_equal(ask(server, LONG, new_tokens=4), oracle)
