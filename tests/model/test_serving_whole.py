"""Whole prompts in one prefill chunk, against the oracle."""

from __future__ import annotations

import pytest
from serving import CachedOracle, PromptOf, ask, assert_equal

from local_server import LocalServer

SERVER_ARGS = ("--chunked-prefill-size", "4096")


@pytest.mark.parametrize("tokens", [1, 127, 128, 129, 2047])
def test_prefill(server: LocalServer, oracle: CachedOracle, tokens: int, seed: int, prompt_of: PromptOf) -> None:
    assert_equal(ask(server, prompt_of(tokens, seed), new_tokens=4), oracle)


def test_long_prefill(server: LocalServer, oracle: CachedOracle, long_prompt: list[int]) -> None:
    assert_equal(ask(server, long_prompt, new_tokens=4), oracle)
