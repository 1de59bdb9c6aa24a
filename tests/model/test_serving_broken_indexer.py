"""The long case can fail: an indexer that is off by one block is caught, and only by prompts it matters for."""

from __future__ import annotations

from pathlib import Path

from serving import CachedOracle, ask, assert_equal, deviation

from local_server import LocalServer
from sglang_sm120_reference.oracle import LOGPROB_TOLERANCE

SERVER_ARGS = ("--chunked-prefill-size", "512")
SERVER_LAUNCHER = (str(Path(__file__).with_name("broken_indexer_server.py")),)
SERVER_ENV = {"SGLANG_SM120_PROVIDER": "indexer_topk=off_by_one_block"}


def test_long_case_fails(server: LocalServer, oracle: CachedOracle, long_prompt: list[int]) -> None:
    error, _ = deviation(ask(server, long_prompt, new_tokens=1), oracle)
    assert error > 2 * LOGPROB_TOLERANCE


def test_short_case_cannot_tell(server: LocalServer, oracle: CachedOracle, short_prompt: list[int]) -> None:
    assert_equal(ask(server, short_prompt, new_tokens=1), oracle)
