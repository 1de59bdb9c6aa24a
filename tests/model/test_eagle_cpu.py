"""EAGLE on a CPU through HTTP: speculation changes how fast tokens come, never which."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import compared_server
import httpx
import pytest
from tokenizers import Tokenizer

from local_server import EAGLE, PLAIN, LocalServer
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

VOCABULARY = 640
# So hot that many of few tokens are not the most likely ones.
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0}, "sampled": {"temperature": 2},
    "top_k": {"temperature": 4, "top_k": 3}, "top_p": {"temperature": 3, "top_p": 0.6},
}  # fmt: skip
ASKED = [" small", " through", " first", " good"]

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


def generate(server: LocalServer, prompt: list[int] | list[list[int]], new: int = NEW) -> Any:
    greedy = {"max_new_tokens": new, "temperature": 0, "ignore_eos": True}
    return post(server, {"input_ids": prompt, "sampling_params": greedy, "top_logprobs_num": 2})


def post(server: LocalServer, body: dict[str, Any]) -> Any:
    response = httpx.post(f"{server.url}/generate", json=body | {"return_logprob": True}, timeout=600)
    response.raise_for_status()
    return response.json()


def said(reply: Reply) -> list[tuple[int, float, float]]:
    """Each output token, its log-probability, and how far the two most likely ones are apart."""
    meta = reply["meta_info"]
    rows = zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True)
    answer = [(token, value, first - second) for (value, token, _), ((first, *_), (second, *_)) in rows]
    assert [token for token, *_ in answer] == reply["output_ids"]
    return answer


def everything(server: LocalServer, prompts: list[list[int]], first: int = 0) -> list[Reply]:
    """Each prompt from `first` on alone, all of them together (now from the prefix cache), and short answers."""
    alone = [generate(server, prompt) for prompt in prompts[first:]]
    together = generate(server, prompts)
    assert together[-1]["meta_info"]["cached_tokens"] >= 512
    return alone + together + [generate(server, prompts[1], new) for new in (1, 2, 3, 6)]


@pytest.fixture(scope="module")
def expected(checkpoint: Path, prompts: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What a server without speculation says."""
    log = tmp_path_factory.mktemp("plain") / "server.log"
    with LocalServer(checkpoint, *COMMON, log=log) as server:
        found = [said(reply) for reply in everything(server, prompts)]
    server.require_step(PLAIN)
    return found


class Speculation(NamedTuple):
    """A server that verifies `steps` + 1 tokens at once.

    first: of the prompts that are asked alone too.
    """

    steps: int
    ranks: tuple[str, ...] = ()
    first: int = 0


SPECULATIONS = {
    "3 steps": Speculation(3),
    # The most that the compressor can take back.
    "9 steps": Speculation(9, first=2),
    "3 steps, two ranks that share the experts": Speculation(3, ("--tp", "2", "--ep-size", "2"), first=3),
}


@pytest.fixture(scope="module", params=SPECULATIONS.values(), ids=SPECULATIONS)
def speculation(request: pytest.FixtureRequest) -> Speculation:
    return request.param


@pytest.fixture(scope="module")
def speculating(
    speculation: Speculation, checkpoint: Path, expected: list[Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LocalServer]:
    log = tmp_path_factory.mktemp("eagle") / "server.log"
    # `expected` is asked for here so that its server is gone before this one starts.
    flags, launcher = (*COMMON, *eagle(speculation.steps), *speculation.ranks), (str(compared_server.__file__),)
    with LocalServer(checkpoint, *flags, log=log, launcher=launcher) as server:
        yield server
    server.require_step(EAGLE)


@pytest.fixture(scope="module")
def replies(speculating: LocalServer, speculation: Speculation, prompts: list[list[int]]) -> list[Reply]:
    return everything(speculating, prompts, speculation.first)


def test_tokens_and_logprobs_are_those_without_speculation(
    replies: list[Reply], expected: list[Any], speculation: Speculation
) -> None:
    errors, answers = [], expected[speculation.first :]
    for reply, plain in zip(replies, answers, strict=True):
        answer = said(reply)
        assert len(answer) == len(plain)
        for (token, value, _), (plain_token, plain_value, margin) in zip(answer, plain, strict=True):
            if token != plain_token:
                # Behind a tie that rounding decided, the two answer different things.
                assert margin < 2 * TOLERANCE
                break
            errors.append(abs(value - plain_value))
    same = len(errors) / sum(len(plain) for plain in answers)
    within = sum(error <= TOLERANCE for error in errors) / len(errors)
    print(f"{same:.1%} of the tokens are the same, largest error {max(errors):.4f}, {within:.1%} within {TOLERANCE}")
    assert same > 0.9
    assert within >= MIN_WITHIN


def test_stand_ins_are_as_sglang_is(speculating: LocalServer, speculation: Speculation) -> None:
    """What `standin.py` gives the step in other tests has the names, dtypes and shapes of this server's."""
    found = re.findall(rf"{compared_server.COMPARED} ([^:]*): (.*)", speculating.log.read_text())
    ranks = 2 if speculation.ranks else 1
    passes = ["extend", "target_verify"], ["extend", "decode", "draft_extend_v2"]
    wanted = [f"the {name}" for name in ("target", "draft")]
    wanted += [f"a {mode} pass of {name}" for name, modes in zip(tuple(wanted), passes, strict=True) for mode in modes]
    assert sorted(what for what, _ in found) == sorted(wanted * ranks)
    assert not [(what, differences) for what, differences in found if differences != "[]"]


def test_drafts_are_accepted_and_refused(replies: list[Reply], speculation: Speculation) -> None:
    steps = speculation.steps
    long = [reply["meta_info"] for reply in replies if reply["meta_info"]["completion_tokens"] == NEW]
    passes = sum(meta["spec_verify_ct"] for meta in long)
    counts = [sum(column) for column in zip(*(meta["spec_correct_drafts_histogram"] for meta in long), strict=False)]
    # The first token of an answer comes from prefill.
    accepted = len(long) * (NEW - 1) / passes
    print(f"{steps} steps: {accepted:.2f} tokens a verification, {passes} verifications, accepted drafts {counts}")
    assert all(0 <= meta["spec_accept_rate"] <= 1 for meta in long)
    # Nothing accepted would be 1, everything `steps` + 1; guessing gives 1 + 1/640.
    assert 1.5 < accepted < steps + 1


Row = tuple[int, float, list[float]]
"""A sampled token, its probability and the largest probabilities there, by temperature and before a filter."""


@pytest.fixture(scope="module")
def sampled(speculating: LocalServer, prompts: list[list[int]]) -> dict[str, list[Reply]]:
    """Replies to each kind of request, all kinds in one batch."""
    kinds = [kind for kind in KINDS for _ in prompts]
    body = {
        "input_ids": prompts * len(KINDS),
        "sampling_params": [{"max_new_tokens": 16, "ignore_eos": True} | KINDS[kind] for kind in kinds],
        "top_logprobs_num": [VOCABULARY if kind == "top_p" else 5 for kind in kinds],
    }
    found: dict[str, list[Reply]] = {kind: [] for kind in KINDS}
    for _ in range(2):
        for kind, reply in zip(kinds, post(speculating, body), strict=True):
            found[kind].append(reply)
    return found


def rows(reply: Reply) -> list[Row]:
    """Without the first token, which was sampled after prefill, without speculation."""
    meta = reply["meta_info"]
    both = zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True)
    return [(token, math.exp(own), [math.exp(value) for value, *_ in top]) for (own, token, _), top in both][1:]


def kept(kind: str, probabilities: list[float]) -> int:
    """How many of the largest probabilities the filter of this kind leaves."""
    count = KINDS[kind].get("top_k", len(probabilities))
    before = [sum(probabilities[:i]) for i in range(count)]
    return sum(mass < KINDS[kind].get("top_p", math.inf) for mass in before)


@pytest.mark.parametrize("kind", ["sampled", "top_k", "top_p"])
def test_sampled_tokens_are_drawn_from_the_models_distribution(sampled: dict[str, list[Reply]], kind: str) -> None:
    """How often the most likely token was not taken, against the sum of the probabilities that it would not be.

    The two differ by a sum of independent zero-mean terms, whatever the tokens before were. A filter leaves the most
    likely tokens, in their proportions, and no others.
    """
    others, chance, variance, greedy, unfiltered = 0, 0.0, 0.0, 0.0, 0.0
    for _, own, probabilities in (row for reply in sampled[kind] for row in rows(reply)):
        count = kept(kind, probabilities)
        total = sum(probabilities[:count]) if kind != "sampled" else 1.0
        # Equal probabilities may be in any order, so values are compared.
        assert kind == "sampled" or own > probabilities[count - 1] * (1 - 1e-5), (own, probabilities[: count + 1])
        best = probabilities[0] / total
        others += own < probabilities[0] * (1 - 1e-5)
        chance, variance = chance + 1 - best, variance + best * (1 - best)
        greedy, unfiltered = greedy - math.log(best), unfiltered - math.log(total)
    deviation = math.sqrt(variance)
    print(f"{kind}: {others} tokens were not the most likely ones, expected {chance:.1f} +- {deviation:.1f}; "
          f"none would be with e^-{greedy:.0f}, all would pass without a filter with e^-{unfiltered:.0f}")  # fmt: skip
    # A server that turns greedy takes no other token, one that drops the filter takes some that it removes.
    assert others and greedy > 10
    assert kind == "sampled" or unfiltered > 10
    assert abs(others - chance) < 5 * deviation
    answers = {tuple(reply["output_ids"]) for reply in sampled[kind]}
    assert len(answers) > 1


def test_greedy_and_sampled_requests_share_a_batch(
    sampled: dict[str, list[Reply]], prompts: list[list[int]], expected: list[Any]
) -> None:
    """A greedy request keeps its answer, up to a tie, when the verification beside it samples."""
    for i, reply in enumerate(sampled["greedy"]):
        rest = zip(reply["output_ids"], expected[i % len(prompts)], strict=False)
        different = [margin for token, (plain, _, margin) in rest if token != plain]
        assert not different or different[0] < 2 * TOLERANCE


@pytest.mark.parametrize(("listed", "right"), [(ASKED, " small"), (ASKED[1:], None)], ids=["listed", "not listed"])
def test_a_json_schema_holds_for_drafts_too(speculating: LocalServer, listed: list[str], right: str | None) -> None:
    """The model was trained to answer with the word that it was asked for; a schema without it forces another."""
    words = {"type": "string", "enum": listed}
    schema = {"type": "object", "properties": {"word": words}, "required": ["word"]}
    body = {
        "model": "default",
        "messages": [{"role": "user", "content": "json small"}],
        "max_tokens": 32,
        "temperature": 0,
        "response_format": {"type": "json_schema", "json_schema": {"name": "words", "schema": schema}},
    }
    response = httpx.post(f"{speculating.url}/v1/chat/completions", json=body, timeout=600)
    response.raise_for_status()
    answer = json.loads(response.json()["choices"][0]["message"]["content"])
    assert set(answer) == {"word"} and answer["word"] in listed
    assert right is None or answer["word"] == right
