"""What the server tests share: requests with log-probabilities, and their comparison with the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx
import torch

from local_server import LocalServer
from sglang_sm120_reference.oracle import LOGPROB_TOLERANCE, Oracle, Result

# (tokens, seed) to token ids.
PromptOf = Callable[[int, int], list[int]]

# The share of positions where rounding alone may decide between two experts or index entries.
MAX_EXCLUDED = 0.02


@dataclass
class Answer:
    """One completion: what was sent, what came back, and the log-probabilities of both from `start` on."""

    prompt: list[int]
    output: list[int]
    start: int
    logprobs: torch.Tensor
    cached_tokens: int

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output


class CachedOracle:
    """The oracle, which looks at each token sequence once."""

    def __init__(self, oracle: Oracle) -> None:
        self.oracle = oracle
        self._seen: dict[tuple[int, ...], Result] = {}

    def __call__(self, tokens: list[int]) -> Result:
        key = tuple(tokens)
        if key not in self._seen:
            self._seen[key] = self.oracle.forward(tokens)
        return self._seen[key]


def request_body(prompt: list[int] | list[list[int]], new_tokens: int, start: int = 0) -> dict[str, Any]:
    """A greedy /generate request that asks for the log-probabilities from position `start` on."""
    return {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": new_tokens, "temperature": 0, "ignore_eos": True},
        "return_logprob": True,
        "logprob_start_len": start,
    }


def answer_of(prompt: list[int], start: int, reply: dict[str, Any]) -> Answer:
    """Read one element of a /generate response; `input_token_logprobs[0]` has no predecessor and is dropped."""
    meta = reply["meta_info"]
    values = [entry[0] for entry in meta["input_token_logprobs"][1:] + meta["output_token_logprobs"]]
    return Answer(prompt, reply["output_ids"], start, torch.tensor(values), meta["cached_tokens"])


def ask(server: LocalServer, prompt: list[int], new_tokens: int = 1, start: int = 0) -> Answer:
    """Send one prompt of token ids."""
    response = httpx.post(f"{server.url}/generate", json=request_body(prompt, new_tokens, start), timeout=300)
    response.raise_for_status()
    return answer_of(prompt, start, response.json())


def ask_batch(server: LocalServer, prompts: list[list[int]], new_tokens: int) -> list[Answer]:
    """Send several prompts that are prefilled and decoded together."""
    response = httpx.post(f"{server.url}/generate", json=request_body(prompts, new_tokens), timeout=300)
    response.raise_for_status()
    return [answer_of(prompt, 0, reply) for prompt, reply in zip(prompts, response.json(), strict=True)]


def deviation(answer: Answer, oracle: CachedOracle) -> tuple[float, float]:
    """Return (largest log-probability error over the decided positions, share of undecided positions)."""
    result = oracle(answer.tokens)
    scored = torch.arange(answer.start, len(answer.tokens) - 1)
    expected = result.logprobs[scored, torch.tensor(answer.tokens)[scored + 1]]
    assert answer.logprobs.shape == expected.shape, "the server scored other positions than asked"
    decided = result.decided()[scored]
    error = (answer.logprobs - expected).abs()
    assert error.isfinite().all(), "the server returned a log-probability that is not finite"
    return (error[decided].max().item() if decided.any() else 0.0), 1 - decided.float().mean().item()


def greedy_until_tie(answer: Answer, oracle: CachedOracle) -> tuple[list[int], list[int]]:
    """Return (the server's, the oracle's) greedy tokens up to the first undecided position or top-1 tie."""
    result = oracle(answer.tokens)
    decided = result.decided()
    rows = slice(len(answer.prompt) - 1, len(answer.tokens) - 1)
    best = result.logprobs[rows].topk(2)
    clear = decided[rows] & (best.values[:, 0] - best.values[:, 1] >= 2 * LOGPROB_TOLERANCE)
    n = int(clear.long().cumprod(0).sum())
    return answer.output[:n], best.indices[:n, 0].tolist()


def assert_equal(answer: Answer, oracle: CachedOracle) -> None:
    """The server's log-probabilities and greedy tokens are the oracle's."""
    error, excluded = deviation(answer, oracle)
    print(f"{len(answer.prompt)} + {len(answer.output)} tokens: largest error {error:.4f}, {excluded:.2%} excluded")
    assert excluded <= MAX_EXCLUDED or excluded * len(answer.logprobs) <= 1
    assert error <= LOGPROB_TOLERANCE
    served, expected = greedy_until_tie(answer, oracle)
    assert served == expected


def assert_chunked(server: LocalServer, oracle: CachedOracle, prompt: list[int]) -> None:
    """A long prompt of a server with chunks of 512 tokens."""
    answer = ask(server, prompt, new_tokens=4)
    assert answer.cached_tokens == 0
    assert "#new-token: 512" in server.log.read_text()
    assert_equal(answer, oracle)


def assert_batch_of_three(
    server: LocalServer, oracle: CachedOracle, prompt_of: PromptOf, seed: int, new_tokens: int
) -> None:
    """Three prompts, decoded together by a server that logs every decode step."""
    prompts = [prompt_of(tokens, seed + tokens) for tokens in (5, 130, 333)]
    answers = ask_batch(server, prompts, new_tokens)
    assert "Decode batch, #running-req: 3" in server.log.read_text()
    for answer in answers:
        assert_equal(answer, oracle)
