"""Two tensor-parallel CPU processes, against the oracle: heads, sink, groups, experts and scales are sharded.

Both take their parts of whole tensors in another order than the files', as with `SGLANG_SM120_LOADER=1` on cards.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from serving import CachedOracle, PromptOf, ask, assert_batch_of_three, assert_chunked, assert_equal

from local_server import LocalServer

SERVER_ARGS = ("--tp", "2", "--chunked-prefill-size", "512", "--decode-log-interval", "1")
SERVER_LAUNCHER = (str(Path(__file__).with_name("whole_tensors_server.py")),)


def test_each_rank_reads_whole_tensors(server: LocalServer) -> None:
    log = server.log.read_text(errors="replace")
    assert sorted(re.findall(r" (TP\d)\] sglang_sm120: [\d.]+ GB of weights read in", log)) == ["TP0", "TP1"]


@pytest.mark.parametrize("tokens", [1, 127, 128, 129])
def test_prefill_and_decode(
    server: LocalServer, oracle: CachedOracle, tokens: int, seed: int, prompt_of: PromptOf
) -> None:
    assert_equal(ask(server, prompt_of(tokens, seed), new_tokens=8), oracle)


def test_chunked_prefill(server: LocalServer, oracle: CachedOracle, long_prompt: list[int]) -> None:
    assert_chunked(server, oracle, long_prompt)


def test_three_requests_in_one_batch(server: LocalServer, oracle: CachedOracle, seed: int, prompt_of: PromptOf) -> None:
    assert_batch_of_three(server, oracle, prompt_of, seed, new_tokens=6)
