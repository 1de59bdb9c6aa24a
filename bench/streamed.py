"""Streamed answers of a server, and the pace at which tokens arrive while all its requests decode."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx

INTERVAL = 8
"""Tokens of one streamed chunk after the first."""
TOKENS = 10_000
"""Prompts are drawn from the first so many tokens."""


class Chunk(NamedTuple):
    """Seconds since the request, and how many tokens the answer has by then; verifications: of the last one, of all."""

    seconds: float
    tokens: int
    verifications: int


def drawn(count: int, rng: random.Random) -> list[int]:
    """A prompt of random tokens, none of them special."""
    return [rng.randrange(300, TOKENS) for _ in range(count)]


def events(answer: httpx.Response) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed /generate answer, as they come.

    Raises:
        RuntimeError: one of them is an error.
    """
    for line in answer.iter_lines():
        if not line.startswith("data:") or line == "data: [DONE]":
            continue
        chunk = json.loads(line[5:])
        if "error" in chunk:
            raise RuntimeError(f"/generate answers: {chunk['error']}")
        yield chunk


def ask(url: str, prompts: list[list[int]], tokens: int) -> list[list[Chunk]]:
    """The chunks of each prompt's answer of so many tokens, sampled, so that requests and their experts stay different.

    Raises:
        RuntimeError: the server answers with an error, or ends an answer early.
    """
    sampling = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 1.0, "stream_interval": INTERVAL}
    chunks: list[list[Chunk]] = [[] for _ in prompts]
    body = {"input_ids": prompts, "sampling_params": sampling, "stream": True}
    began = time.perf_counter()
    with httpx.stream("POST", f"{url}/generate", json=body, timeout=600) as answer:
        for chunk in events(answer):
            meta = chunk["meta_info"]
            seen = Chunk(time.perf_counter() - began, meta["completion_tokens"], meta.get("spec_verify_ct", 0))
            chunks[chunk.get("index", 0)].append(seen)
    shortest = min(answer[-1].tokens if answer else 0 for answer in chunks)
    if shortest < tokens:
        raise RuntimeError(f"an answer ended after {shortest} of {tokens} tokens")
    return chunks


def pace(chunks: list[list[Chunk]]) -> float:
    """Median milliseconds for one more token, from the moment all requests decode."""
    together = max(answer[0].seconds for answer in chunks)
    return statistics.median(
        (b.seconds - a.seconds) * 1000 / (b.tokens - a.tokens)
        for answer in chunks
        for a, b in zip(answer, answer[1:], strict=False)
        if a.seconds >= together and b.tokens > a.tokens
    )


def cycle(chunks: list[list[Chunk]]) -> float:
    """Median milliseconds of a verification and what belongs to it, from the moment all requests decode.

    SGLang tells how many an answer took at its end only: they are spread over its tokens.
    """
    together = max(answer[0].seconds for answer in chunks)
    found = []
    for answer in chunks:
        first, last = next(chunk for chunk in answer if chunk.seconds >= together), answer[-1]
        share = (last.tokens - first.tokens) / (last.tokens - answer[0].tokens)
        found.append((last.seconds - first.seconds) * 1000 / (last.verifications * share))
    return statistics.median(found)
