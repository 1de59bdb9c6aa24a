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


def speculation(steps: int) -> tuple[str, ...]:
    """Flags for EAGLE with so many draft steps, one chain of drafts, and all of them to verify."""
    return (
        "--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(steps), "--speculative-eagle-topk", "1",
        "--speculative-num-draft-tokens", str(steps + 1),
    )  # fmt: skip


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


def ask(url: str, prompts: list[list[int]], tokens: int, temperature: float = 1.0) -> list[list[Chunk]]:
    """The chunks of each prompt's answer of so many tokens, sampled, so that requests and their experts stay different.

    temperature: 0 for greedy answers.

    Raises:
        RuntimeError: the server answers with an error, or ends an answer early.
    """
    sampling = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": temperature, "stream_interval": INTERVAL}
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
    """Median milliseconds for one more token, from the moment all requests decode.

    Raises:
        RuntimeError: no answer went on from then.
    """
    return _median(
        (b.seconds - a.seconds) * 1000 / (b.tokens - a.tokens)
        for answer in _together(chunks)
        for a, b in zip(answer, answer[1:], strict=False)
        if b.tokens > a.tokens
    )


def cycle(chunks: list[list[Chunk]]) -> float:
    """Median milliseconds of a verification and what belongs to it, from the moment all requests decode.

    SGLang tells how many an answer took at its end only: they are spread over its tokens.

    Raises:
        RuntimeError: no answer went on from then, or the server does not speculate.
    """
    return _median(
        (part[-1].seconds - part[0].seconds) * 1000 * (whole[-1].tokens - whole[0].tokens)
        / (whole[-1].verifications * (part[-1].tokens - part[0].tokens))
        for whole, part in zip(chunks, _together(chunks), strict=True)
        if len(part) > 1 and part[-1].tokens > part[0].tokens and whole[-1].verifications
    )  # fmt: skip


def _together(chunks: list[list[Chunk]]) -> list[list[Chunk]]:
    """Each answer's chunks from the moment all requests decode."""
    began = max(answer[0].seconds for answer in chunks)
    return [[chunk for chunk in answer if chunk.seconds >= began] for answer in chunks]


def _median(found: Iterator[float]) -> float:
    values = list(found)
    if not values:
        raise RuntimeError("no answer shows a pace: every one ended before all requests decoded, or counts nothing")
    return statistics.median(values)
