"""EAGLE on a CPU through HTTP: speculation changes how fast tokens come, never which."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer

from local_server import LocalServer
from sglang_sm120_reference.packed import unpack

PACKED = Path(__file__).parents[2] / "evals" / "small-deepseek-v4.xz"
# A prompt of 700 tokens comes in two chunks, and a second time from the prefix cache.
COMMON = ("--device", "cpu", "--chunked-prefill-size", "512")
LINES = [
    f' {{"name": "{name}", "value": "{value}"}}'
    for name, value in [("water", "sound"), ("people", "help"), ("number", "place"), ("work", "word"), ("time", "boy")]
]
# While 40 tokens are decoded, the c128 entries of positions 127 and 255 are completed, partly from drafts that came
# together with refused ones, and the window enters a new page, at 256.
LENGTHS = (5, 119, 250, 700)
NEW = 40

# A pass with other rows rounds otherwise: without speculation too, prompts alone and together differ by 0.018.
TOLERANCE = 0.05
# Rounding alone may choose another expert; the trained checkpoint leaves that open at every fifth position.
MIN_WITHIN = 0.97

Reply = dict[str, Any]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained one: its MTP layer is right often enough, and wrong often enough."""
    return unpack(PACKED, tmp_path_factory.mktemp("trained") / "DeepSeek-V4-small")


@pytest.fixture(scope="module")
def prompts(checkpoint: Path) -> list[list[int]]:
    """Token ids of lines of JSON in an order that does not repeat, cut to `LENGTHS`."""
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    text = ",".join(LINES[(i * i + i // 3) % len(LINES)] for i in range(200))
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return [ids[start : start + length] for start, length in zip((0, 9, 31, 80), LENGTHS, strict=True)]


def eagle(steps: int) -> tuple[str, ...]:
    """Flags for one chain of `steps` drafts, verified with the token before them."""
    return ("--speculative-algorithm", "EAGLE", "--speculative-eagle-topk", "1",
            "--speculative-num-steps", str(steps), "--speculative-num-draft-tokens", str(steps + 1))  # fmt: skip


def generate(server: LocalServer, prompt: list[int] | list[list[int]], new: int = NEW, **sampling: Any) -> Any:
    body = {
        "input_ids": prompt,
        "sampling_params": {"max_new_tokens": new, "temperature": 0, "ignore_eos": True} | sampling,
        "return_logprob": True,
        "top_logprobs_num": 2,
    }
    response = httpx.post(f"{server.url}/generate", json=body, timeout=600)
    response.raise_for_status()
    return response.json()


def said(reply: Reply) -> list[tuple[int, float, float]]:
    """Each output token, its log-probability, and how far the two most likely ones are apart."""
    meta = reply["meta_info"]
    rows = zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True)
    answer = [(token, value, first - second) for (value, token, _), ((first, *_), (second, *_)) in rows]
    assert [token for token, *_ in answer] == reply["output_ids"]
    return answer


def everything(server: LocalServer, prompts: list[list[int]]) -> list[Reply]:
    """Each prompt alone, all of them together (now from the prefix cache), and short answers."""
    alone = [generate(server, prompt) for prompt in prompts]
    together = generate(server, prompts)
    assert together[-1]["meta_info"]["cached_tokens"] >= 512
    return alone + together + [generate(server, prompts[1], new) for new in (1, 2, 3, 6)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What a server without speculation says."""
    log = tmp_path_factory.mktemp("plain") / "server.log"
    with LocalServer(checkpoint, *COMMON, log=log) as server:
        return [said(reply) for reply in everything(server, prompts)]


@pytest.fixture(
    scope="module",
    params=[(3,), (9,), (3, "--tp", "2", "--ep-size", "2")],
    ids=["3 steps", "9 steps", "3 steps, two ranks that share the experts"],
)
def speculating(
    request: pytest.FixtureRequest, checkpoint: Path, expected: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[LocalServer, int]]:
    """A server that verifies 4 or 10 tokens at once, the most that the compressor can take back, and its steps."""
    log = tmp_path_factory.mktemp("eagle") / "server.log"
    # `expected` is asked for here so that its server is gone before this one starts.
    steps, *ranks = request.param
    with LocalServer(checkpoint, *COMMON, *eagle(steps), *ranks, log=log) as server:
        yield server, steps


@pytest.fixture(scope="module")
def replies(speculating: tuple[LocalServer, int], prompts: list[list[int]]) -> list[Reply]:
    return everything(speculating[0], prompts)


def test_tokens_and_logprobs_are_those_without_speculation(replies: list[Reply], expected: list[Any]) -> None:
    errors = []
    for reply, plain in zip(replies, expected, strict=True):
        answer = said(reply)
        assert len(answer) == len(plain)
        for (token, value, _), (plain_token, plain_value, margin) in zip(answer, plain, strict=True):
            if token != plain_token:
                # Behind a tie that rounding decided, the two answer different things.
                assert margin < 2 * TOLERANCE
                break
            errors.append(abs(value - plain_value))
    same = len(errors) / sum(len(plain) for plain in expected)
    within = sum(error <= TOLERANCE for error in errors) / len(errors)
    print(f"{same:.1%} of the tokens are the same, largest error {max(errors):.4f}, {within:.1%} within {TOLERANCE}")
    assert same > 0.9
    assert within >= MIN_WITHIN


def test_drafts_are_accepted_and_refused(replies: list[Reply], speculating: tuple[LocalServer, int]) -> None:
    steps = speculating[1]
    long = [reply["meta_info"] for reply in replies if reply["meta_info"]["completion_tokens"] == NEW]
    passes = sum(meta["spec_verify_ct"] for meta in long)
    counts = [sum(column) for column in zip(*(meta["spec_correct_drafts_histogram"] for meta in long), strict=False)]
    # The first token of an answer comes from prefill.
    accepted = len(long) * (NEW - 1) / passes
    print(f"{steps} steps: {accepted:.2f} tokens a verification, {passes} verifications, accepted drafts {counts}")
    assert all(0 <= meta["spec_accept_rate"] <= 1 for meta in long)
    # Nothing accepted would be 1, everything `steps` + 1; guessing gives 1 + 1/640.
    assert 1.5 < accepted < steps + 1


def test_sampled_tokens_are_drawn_from_the_models_distribution(
    speculating: tuple[LocalServer, int], prompts: list[list[int]]
) -> None:
    """How often the most likely token was not taken, against the sum of the probabilities that it would not be.

    The two differ by a sum of independent zero-mean terms, whatever the tokens before were.
    """
    answers = [reply for _ in range(6) for reply in generate(speculating[0], prompts * 2, new=16, temperature=1)]
    others, chance, variance = 0, 0.0, 0.0
    for reply in answers:
        meta = reply["meta_info"]
        rows = zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True)
        # The first token was sampled after prefill, without speculation.
        for (_, token, _), ((best, top, _), *_) in list(rows)[1:]:
            p = math.exp(best)
            others, chance, variance = others + (token != top), chance + 1 - p, variance + p * (1 - p)
    print(f"{others} tokens were not the most likely ones, expected {chance:.1f} +- {math.sqrt(variance):.1f}")
    # A server that turns greedy takes none; this prompt leaves enough to chance to tell.
    assert variance > 15
    assert abs(others - chance) < 5 * math.sqrt(variance)
    assert len({tuple(reply["output_ids"]) for reply in answers}) > len(prompts)


def test_greedy_and_sampled_requests_share_a_batch(
    speculating: tuple[LocalServer, int], prompts: list[list[int]], expected: list[Any]
) -> None:
    """A greedy request keeps its answer, up to a tie, when the verification beside it samples."""
    body = {
        "input_ids": prompts,
        "sampling_params": [
            {"max_new_tokens": NEW, "ignore_eos": True} | kind
            for kind in ({"temperature": 0}, {"temperature": 1, "top_p": 0.9}, {"temperature": 0}, {"top_k": 3})
        ],
    }
    response = httpx.post(f"{speculating[0].url}/generate", json=body, timeout=600)
    response.raise_for_status()
    for i in (0, 2):
        found = response.json()[i]["output_ids"]
        different = [margin for token, (plain, _, margin) in zip(found, expected[i], strict=True) if token != plain]
        assert not different or different[0] < 2 * TOLERANCE
