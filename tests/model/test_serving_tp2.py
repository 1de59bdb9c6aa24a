"""Two tensor-parallel CPU processes, against the oracle: heads, sink, groups, experts and scales are sharded."""

from __future__ import annotations

import pytest
from serving import CachedOracle, PromptOf, ask, assert_equal

from local_server import LocalServer

SERVER_ARGS = ("--tp", "2")


@pytest.mark.parametrize("tokens", [1, 127, 128, 129])
def test_prefill_and_decode(
    server: LocalServer, oracle: CachedOracle, tokens: int, seed: int, prompt_of: PromptOf
) -> None:
    assert_equal(ask(server, prompt_of(tokens, seed), new_tokens=8), oracle)
