"""Chunked prefill, decode, prefix cache, batches, aborts and bad input on one server, against the oracle."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from serving import CachedOracle, PromptOf, ask, assert_batch_of_three, assert_chunked, assert_equal, request_body

from local_server import LocalServer

CONTEXT = 4096
# Every decode step is logged, so that a test can read how many requests it had.
SERVER_ARGS = ("--chunked-prefill-size", "512", "--context-length", str(CONTEXT), "--decode-log-interval", "1")


def test_chunked_prefill(server: LocalServer, oracle: CachedOracle, long_prompt: list[int]) -> None:
    assert_chunked(server, oracle, long_prompt)


@pytest.mark.parametrize("tokens", [122, 250])
def test_decode_across_block_boundaries(
    server: LocalServer, oracle: CachedOracle, tokens: int, seed: int, prompt_of: PromptOf
) -> None:
    # Twelve new tokens complete at least two c4 blocks and, at 128 and 256, a c128 block.
    assert_equal(ask(server, prompt_of(tokens, seed), new_tokens=12), oracle)


def test_decode_past_the_indexer_width(
    server: LocalServer, oracle: CachedOracle, seed: int, prompt_of: PromptOf
) -> None:
    # The 513th c4 entry appears at token 2,052: from there on decode has to choose.
    assert_equal(ask(server, prompt_of(2047, seed), new_tokens=8), oracle)


def test_prefix_cache_hit(server: LocalServer, oracle: CachedOracle, seed: int, prompt_of: PromptOf) -> None:
    shared = prompt_of(600, seed)
    ask(server, shared + prompt_of(40, seed + 1))
    # Log-probabilities are asked for behind the shared part only: SGLang recomputes what it has to score.
    answer = ask(server, shared + prompt_of(70, seed + 2), new_tokens=6, start=550)
    assert answer.cached_tokens >= 512
    assert_equal(answer, oracle)


def test_three_requests_in_one_batch(server: LocalServer, oracle: CachedOracle, seed: int, prompt_of: PromptOf) -> None:
    assert_batch_of_three(server, oracle, prompt_of, seed, new_tokens=10)


def test_aborted_request_beside_a_live_one(
    server: LocalServer, oracle: CachedOracle, seed: int, prompt_of: PromptOf
) -> None:
    doomed = {**request_body(prompt_of(300, seed), 2000), "stream": True, "rid": f"doomed-{seed}"}
    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=300) as client:
        with client.stream("POST", f"{server.url}/generate", json=doomed) as stream:
            lines = stream.iter_lines()
            next(lines)  # it is decoding now
            live = pool.submit(ask, server, prompt_of(150, seed + 1), 16)
            client.post(f"{server.url}/abort_request", json={"rid": doomed["rid"]}).raise_for_status()
            replies = [json.loads(line[5:]) for line in lines if line.startswith("data: {")]
        assert_equal(live.result(), oracle)
    assert replies[-1]["meta_info"]["finish_reason"]["type"] == "abort"


def _error_of(response: httpx.Response) -> str:
    """The message of a refusal: a JSON body with an error, never a traceback."""
    assert 400 <= response.status_code < 500, response.text
    text = json.dumps(response.json())
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"input_ids": []}, "empty"),
        ({"input_ids": [7] * (CONTEXT + 1)}, "context length"),
    ],
    ids=["no tokens", "over the context"],
)
def test_bad_prompt(
    server: LocalServer, oracle: CachedOracle, body: dict[str, object], named: str, short_prompt: list[int]
) -> None:
    """As SGLang itself refuses them; `test_fixes.py` sends what it would not refuse."""
    response = httpx.post(f"{server.url}/generate", json={**body, "sampling_params": {"max_new_tokens": 1}}, timeout=60)
    assert named in _error_of(response)
    assert server.alive()
    assert_equal(ask(server, short_prompt, new_tokens=2), oracle)


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
def test_malformed_json(server: LocalServer, oracle: CachedOracle, path: str, short_prompt: list[int]) -> None:
    response = httpx.post(
        server.url + path, content=b'{"messages": [', headers={"content-type": "application/json"}, timeout=60
    )
    _error_of(response)
    assert_equal(ask(server, short_prompt, new_tokens=2), oracle)


def test_half_of_100_requests_disconnect(
    server: LocalServer, oracle: CachedOracle, seed: int, prompt_of: PromptOf, short_prompt: list[int]
) -> None:
    async def one(client: httpx.AsyncClient, i: int) -> bool:
        body = request_body(prompt_of(20, seed + i), 4)
        if i % 2:
            task = asyncio.create_task(client.post("/generate", json={**body, "sampling_params": {
                "max_new_tokens": 200, "ignore_eos": True}}))  # fmt: skip
            await asyncio.sleep(0.05 * (i % 7))
            task.cancel()  # closes the connection
            return False
        response = await client.post("/generate", json=body)
        return response.status_code == 200 and len(response.json()["output_ids"]) == 4

    async def everybody() -> list[bool]:
        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
            return await asyncio.gather(*(one(client, i) for i in range(100)))

    assert sum(asyncio.run(everybody())) == 50
    assert server.alive()
    assert_equal(ask(server, short_prompt, new_tokens=2), oracle)
