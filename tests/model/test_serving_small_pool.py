"""A window pool far smaller than a prefill chunk still serves: nothing waits for ever."""

from __future__ import annotations

from serving import CachedOracle, PromptOf, ask, assert_equal

from local_server import LocalServer

# 0.1 x 8,192 tokens are three pages; SGLang has to make this chunk smaller for a 1,000-token prompt.
SERVER_ARGS = ("--max-total-tokens", "8192", "--swa-full-tokens-ratio", "0.1", "--chunked-prefill-size", "2048")


def test_prompt_larger_than_the_window_pool(
    server: LocalServer, oracle: CachedOracle, seed: int, prompt_of: PromptOf
) -> None:
    assert "swa=768" in server.log.read_text()
    assert_equal(ask(server, prompt_of(1000, seed), new_tokens=6), oracle)
