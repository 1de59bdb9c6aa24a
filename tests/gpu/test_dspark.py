"""DSpark on this machine's GPUs: the answers of a server without it, and as many tokens a verification as the oracle's.

Verification is uniform (`static`) and ragged (`compact`). On a Hopper card the servers' Triton kernels are lowered as
for SM120, and SGLang's own FP8 products of the drafter are Triton's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from sglang.srt.kernel_plugins.nvidia.binding import _CaptureCheck
from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner
from test_recall import many as many
from test_server import (
    FLAGS,
    GRAPHS,
    VOCABULARY,
    Greedy,
    assert_agree,
    assert_nothing_compiled_late,
    environment,
    flags_of_card,
    generate,
    greedy,
    halving,
    references,
    sampled,
)
from test_server import logs as logs
from test_server import prompts as prompts
from test_server import tp as tp

import sm120_lowering
from local_server import LocalServer
from recall import CONCURRENCY, EXACT, PACKED, scores
from recall import FLAGS as TRAINED_FLAGS
from report import table
from sglang_sm120.checkpoint.config import DSPARK_FOLDER, DSparkConfig, model_config
from sglang_sm120_reference.drafter import Drafter
from sglang_sm120_reference.oracle import Oracle
from sglang_sm120_reference.packed import unpack
from sglang_sm120_reference.write import main as write_checkpoint
from training import data

DRAFTER = PACKED.with_name("small-deepseek-v4-dspark.xz")
MODES = ("static", "compact")
DSPARK = ("--speculative-algorithm", "DSPARK")
ROWS = DSparkConfig.block_size + 1
"""Of a request in a verification, of both drafters."""
LENGTH, COUNT, LONGEST = 512, 64, 96
DIFFERENT = 1
"""Of COUNT answers: one may differ where two tokens are as likely, since a verification's rows round otherwise."""
WORTH = 3.38
"""Tokens that a verification of COUNT answers commits, by the reference."""
OFF = 0.1
"""Share by which a server's verifications may differ from the oracle's: near ties among its proposals."""


SAMPLES = 800


class Asked(NamedTuple):
    """A prompt of token ids, its right answer with the end, and the task."""

    prompt: list[int]
    answer: list[int]
    task: str


class Answered(NamedTuple):
    """Token ids, and how many verifications they took; 0 without speculation."""

    tokens: list[int]
    verifications: int


def questions(count: int = COUNT) -> list[Asked]:
    """One turn each of conversations that were not trained on."""
    rng, found = np.random.default_rng(1 << 20), []
    while len(found) < count:
        row, marks, turns = data.conversation(rng, LENGTH, sparse=False)
        if turns:
            turn = int(rng.integers(len(turns))) + 1
            start = marks.index(turn) + 1
            told = turns[turn - 1]
            found.append(Asked(row[:start], [*told.answer, data.EOS], told.task))
    return found


def answers(server: LocalServer, asked: list[Asked]) -> list[Answered]:
    sampling = {"max_new_tokens": LONGEST, "temperature": 0}

    def one(question: Asked) -> Answered:
        reply = generate(server, {"input_ids": question.prompt, "sampling_params": sampling})
        tokens = [*reply["output_ids"]]
        # Where the end is not among them.
        if reply["meta_info"]["finish_reason"]["type"] == "stop" and tokens[-1:] != [data.EOS]:
            tokens.append(data.EOS)
        return Answered(tokens, reply["meta_info"].get("spec_verify_ct", 0))

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        return list(pool.map(one, asked))


def scores_after(server: LocalServer, prompt: list[int]) -> dict[int, float]:
    """Log-probabilities of all tokens after a prompt, by its prefill, which drafts nothing."""
    one = {"max_new_tokens": 1, "temperature": 0}
    body = {"input_ids": prompt, "sampling_params": one, "return_logprob": True, "top_logprobs_num": data.VOCAB}
    entries = generate(server, body)["meta_info"]["output_top_logprobs"][0]
    return {token: score for score, token, _ in entries}


def assert_sampled_tokens_follow_the_distribution(server: LocalServer, prompt: list[int]) -> None:
    """The second token of an answer, which a verification decides, comes as often as the prefill's scores say.

    The temperature gives the likeliest a half; after the first token that comes most often.
    """
    first = max(scores := scores_after(server, prompt), key=lambda token: scores[token])
    second = scores_after(server, [*prompt, first])
    likeliest = max(second, key=lambda token: second[token])
    temperature = halving(torch.tensor([*second.values()]))
    sampling = {"max_new_tokens": 2, "temperature": temperature, "ignore_eos": True}

    def one(_: int) -> list[int]:
        return generate(server, {"input_ids": prompt, "sampling_params": sampling})["output_ids"]

    with ThreadPoolExecutor(CONCURRENCY) as pool:
        after = [b for a, b in pool.map(one, range(SAMPLES)) if a == first]
    hits = after.count(likeliest)
    print(f"{hits} of {len(after)} samples are the likeliest token, expected a half, at temperature {temperature:.2f}")
    # Five standard deviations.
    assert len(after) > SAMPLES // 4
    assert abs(hits - len(after) / 2) < 2.5 * len(after) ** 0.5


def replayed(drafter: Drafter, asked: list[Asked], found: list[Answered]) -> list[int]:
    """Verifications of the same answers by the oracle's drafter."""
    return [
        len(drafter.replay([*question.prompt, *answer.tokens], len(question.prompt)))
        for question, answer in zip(asked, found, strict=True)
    ]


def by_task(asked: list[Asked], found: list[Answered], oracle: list[int]) -> str:
    """Tokens a verification by task, the server's and the oracle's; an answer's first token is the prefill's."""
    lines = []
    for task in (*sorted({question.task for question in asked}), None):
        chosen = [at for at, question in enumerate(asked) if task in (None, question.task)]
        tokens = sum(len(found[at].tokens) - 1 for at in chosen)
        ours, theirs = sum(found[at].verifications for at in chosen), sum(oracle[at] for at in chosen)
        told = f"{tokens / max(ours, 1):.2f}, the oracle's {tokens / max(theirs, 1):.2f}"
        lines.append(f"{task or 'all':12} {told} tokens a verification ({tokens} of {ours} and {theirs})")
    return "\n".join(lines)


def flags(*more: str) -> tuple[str, ...]:
    hopper = torch.cuda.get_device_capability()[0] == 9
    return (*flags_of_card(), *(sm120_lowering.DRAFTER_FLAGS if hopper else ()), *more)


def assert_drafted(server: LocalServer, mode: str) -> None:
    """The step's stages and its verification, both in graphs; both have passes of the same name.

    Of ragged graphs, which it counts by tokens and not by requests, SGLang does not say whose forward they hold: the
    step's first pass is the capture of the largest one, and no batch was decoded without a graph.
    """
    text = server.log.read_text(errors="replace")
    for name in ("sglang-sm120", "sglang-sm120-dspark"):
        assert f"active ({name}:" in text
        assert f"{name} runs the decode graphs" in text or (mode, name) == ("compact", "sglang-sm120")
    rows = ROWS * int(GRAPHS[-1])
    assert f"the step takes its first target_verify pass ({rows} rows)" in text
    assert "cuda graph: True" in text
    # A host read in the block's metadata would end its capture, with this line and nothing else.
    assert "glue-graph capture failed" not in text
    assert not [line for line in text.splitlines() if "Decode batch" in line and "cuda graph: False" in line]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = unpack(PACKED, tmp_path_factory.mktemp("trained") / "DeepSeek-V4-small")
    unpack(DRAFTER, folder / DSPARK_FOLDER)
    return folder


@pytest.fixture(scope="module")
def plain(trained: Path, logs: Path) -> list[Answered]:
    log = logs / "dspark-plain.log"
    with LocalServer(trained, *TRAINED_FLAGS, *flags(), log=log, env=environment(), ready_seconds=400) as server:
        return answers(server, questions())


@pytest.fixture(params=MODES)
def drafting(
    request: pytest.FixtureRequest, trained: Path, plain: list[Answered], logs: Path, tp: int
) -> Iterator[LocalServer]:
    """A server with the trained drafter; `plain` first, as two servers may not fit one card."""
    env = environment() | {"SGLANG_RAGGED_VERIFY_MODE": request.param}
    log = logs / f"dspark-{request.param}-tp{tp}.log"
    with LocalServer(
        trained, *TRAINED_FLAGS, *flags(*DSPARK), "--tp", str(tp), log=log, env=env, ready_seconds=600
    ) as server:
        yield server


def test_the_trained_drafter(
    request: pytest.FixtureRequest, drafting: LocalServer, trained: Path, plain: list[Answered], many: Path
) -> None:
    """The answers without it, right ones, in as few verifications as the oracle's drafter; recall as without."""
    asked = questions()
    found = answers(drafting, asked)
    oracle = replayed(Drafter(Oracle(trained, device="cuda")), asked, found)
    print(f"\n{by_task(asked, found, oracle)}")
    different = [at for at in range(COUNT) if found[at].tokens != plain[at].tokens]
    right = sum(answer.tokens == question.answer for question, answer in zip(asked, found, strict=True))
    print(f"{right} of {COUNT} right, {len(different)} other than without DSpark: {different}")
    assert_sampled_tokens_follow_the_distribution(drafting, asked[0].prompt)
    rows, accepted = scores(drafting.url, EXACT, many)
    print(f"accepted length of all {accepted}\n{table(rows)}")
    assert len(different) <= DIFFERENT and right >= 0.95 * COUNT
    verifications = sum(answer.verifications for answer in found)
    assert abs(verifications - sum(oracle)) <= OFF * sum(oracle) + 1
    # Better than a drafter that is never right.
    assert sum(len(answer.tokens) - 1 for answer in found) > 1.2 * verifications
    assert accepted is not None and all(row.verdict == "pass" for row in rows)
    assert_drafted(drafting, request.node.callspec.params["drafting"])
    assert_nothing_compiled_late(drafting)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full width, six layers, random weights, and a drafter of three stages."""
    place = tmp_path_factory.mktemp("wide")
    (like := place / "like.json").write_text(json.dumps(model_config()))
    options = ("--ratios", "0,0,4,128,4,128", "--n-routed-experts", 16, "--vocab-size", VOCABULARY, "--no-mtp")
    arguments: tuple[Any, ...] = (place / "model", "--like", like, *options, "--dspark", "1,3,5")
    assert write_checkpoint([str(argument) for argument in arguments]) == 0
    return place / "model"


@pytest.fixture(scope="module")
def expected(wide: Path, logs: Path, prompts: list[list[int]]) -> list[Greedy]:
    return references(wide, logs / "dspark-torch.log", prompts)


@pytest.mark.parametrize("mode", MODES)
def test_random_weights_of_full_width(
    mode: str, wide: Path, logs: Path, tp: int, prompts: list[list[int]], expected: list[Greedy], seed: int
) -> None:
    """Answers as without, whatever is drafted, and sampled requests are answered in full."""
    env = environment() | {"SGLANG_RAGGED_VERIFY_MODE": mode}
    log = logs / f"dspark-wide-{mode}-tp{tp}.log"
    arguments = (*FLAGS, *GRAPHS, *flags(*DSPARK), "--tp", str(tp))
    with LocalServer(wide, *arguments, log=log, env=env, ready_seconds=600) as server:
        assert_agree(greedy(server, prompts), expected)
        sampled(server, 50, seed)
        assert server.alive()
        assert_drafted(server, mode)
        assert_nothing_compiled_late(server)


@pytest.mark.needs_no_gpu
@pytest.mark.parametrize(("ragged", "concludes"), [(False, True), (True, False)])
def test_sglang_does_not_say_whose_ragged_graphs_are(ragged: bool, concludes: bool) -> None:
    """Where it does, `assert_drafted` has no exception to make."""
    sizes = [*map(int, GRAPHS[1:])]
    runner = SimpleNamespace(capture_bs=sizes, captured_req_width=ROWS, max_bs=sizes[-1])
    held = [DecodeCudaGraphRunner._ragged_capture_slots(runner, size * ROWS) if ragged else size for size in sizes]
    binding = SimpleNamespace(assert_live=lambda: None)
    dispatch = SimpleNamespace(captured=dict.fromkeys(held, "a step"), binding=binding)
    check = _CaptureCheck(spec=SimpleNamespace(name="of the target"), dispatch=dispatch)
    check(runner, None, None, ROWS)
    assert check.is_done == concludes


@pytest.mark.needs_no_gpu
def test_what_the_trained_drafter_is_worth(trained: Path) -> None:
    """By the reference, over right answers that were not trained on: as docs/training.md says, a tenth off at most."""
    asked = questions()
    answered = [Answered(question.answer, 0) for question in asked]
    verified = sum(replayed(Drafter(Oracle(trained)), asked, answered))
    worth = sum(len(question.answer) - 1 for question in asked) / verified
    assert worth >= 0.9 * WORTH, f"{worth:.2f} tokens a verification"


@pytest.mark.needs_no_gpu
def test_the_questions_are_whole_turns() -> None:
    asked = questions()
    assert len(asked) == COUNT and len({question.task for question in asked}) >= 4
    assert all(len(q.prompt) + len(q.answer) <= LENGTH and len(q.answer) < LONGEST for q in asked)
    header = [data.ASSISTANT, *data.ids("</think>")]
    assert all(question.prompt[-len(header) :] == header for question in asked)


@pytest.mark.needs_no_gpu
def test_verifications_are_counted_as_the_oracle_replays_them(tmp_path: Path) -> None:
    """On the small model with a drafter of random weights, nothing of which is right."""
    folder = unpack(PACKED, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "like.json").write_text(json.dumps(config))
    like = ["--like", str(tmp_path / "like.json"), "--dspark", "0,1"]
    assert write_checkpoint([str(tmp_path / "random"), *like]) == 0
    os.rename(tmp_path / "random" / DSPARK_FOLDER, folder / DSPARK_FOLDER)
    asked = [question for question in questions() if len(question.answer) <= 6][:2]
    found = [Answered(question.answer, len(question.answer) - 1) for question in asked]
    oracle = replayed(Drafter(Oracle(folder)), asked, found)
    assert oracle == [answer.verifications for answer in found]
    assert by_task(asked, found, oracle).splitlines()[-1].startswith("all          1.00, the oracle's 1.00 tokens")
