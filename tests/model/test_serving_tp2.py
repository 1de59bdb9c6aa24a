"""Two tensor-parallel CPU processes, against the oracle: heads, sink, groups, experts and scales are sharded."""

from __future__ import annotations

import pytest
from serving import CachedOracle, PromptOf, ask, ask_batch, assert_equal

from local_server import LocalServer

SERVER_ARGS = ("--tp", "2", "--chunked-prefill-size", "512", "--decode-log-interval", "1")


@pytest.mark.parametrize("tokens", [1, 127, 128, 129])
def test_prefill_and_decode(
    server: LocalServer, oracle: CachedOracle, tokens: int, seed: int, prompt_of: PromptOf
) -> None:
    assert_equal(ask(server, prompt_of(tokens, seed), new_tokens=8), oracle)


def test_chunked_prefill(server: LocalServer, oracle: CachedOracle, long_prompt: list[int]) -> None:
    answer = ask(server, long_prompt, new_tokens=4)
    assert answer.cached_tokens == 0
    assert "#new-token: 512" in server.log.read_text()
    assert_equal(answer, oracle)


def test_three_requests_in_one_batch(server: LocalServer, oracle: CachedOracle, seed: int, prompt_of: PromptOf) -> None:
    prompts = [prompt_of(tokens, seed + tokens) for tokens in (5, 130, 333)]
    answers = ask_batch(server, prompts, new_tokens=6)
    assert "Decode batch, #running-req: 3" in server.log.read_text()
    for answer in answers:
        assert_equal(answer, oracle)
