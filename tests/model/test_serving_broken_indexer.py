"""The long case can fail: an indexer that is off by one block is caught, and only by prompts it matters for.

A window pool far smaller than a prefill chunk is tried on the same server, with a prompt that the defect cannot touch.
"""

from __future__ import annotations

from pathlib import Path

from serving import CachedOracle, PromptOf, ask, assert_equal, deviation

from local_server import LocalServer
from sglang_sm120_reference.oracle import LOGPROB_TOLERANCE

# 0.1 x 8,192 tokens are three pages of window; SGLang has to make this chunk smaller for a prompt of 1,000 tokens.
SERVER_ARGS = ("--max-total-tokens", "8192", "--swa-full-tokens-ratio", "0.1", "--chunked-prefill-size", "2048")
SERVER_LAUNCHER = (str(Path(__file__).with_name("broken_indexer_server.py")),)
SERVER_ENV = {"SGLANG_SM120_PROVIDER": "indexer_topk=off_by_one_block"}


def test_long_case_fails(server: LocalServer, oracle: CachedOracle, long_prompt: list[int]) -> None:
    error, _ = deviation(ask(server, long_prompt, new_tokens=1), oracle)
    assert error > 2 * LOGPROB_TOLERANCE


def test_short_case_cannot_tell(server: LocalServer, oracle: CachedOracle, short_prompt: list[int]) -> None:
    assert_equal(ask(server, short_prompt, new_tokens=1), oracle)


def test_prompt_larger_than_the_window_pool(
    server: LocalServer, oracle: CachedOracle, seed: int, prompt_of: PromptOf
) -> None:
    """Nothing waits for ever; up to 2,048 tokens every index entry is selected, in whichever order."""
    assert "swa=768" in server.log.read_text()
    assert_equal(ask(server, prompt_of(1000, seed), new_tokens=6), oracle)
