"""The trained small checkpoint on this machine's CPU, and the questions it is asked."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_training import TINY, export_random

import accuracy_cpu
import demo
import questions
import synthetic
from questions import Part
from sglang_sm120_reference.attention import Attention
from sglang_sm120_reference.defects import Defect
from sglang_sm120_reference.oracle import LOGPROB_TOLERANCE, Oracle
from sglang_sm120_reference.packed import unpack
from training import data, train

EVALS = Path(__file__).parents[2] / "evals"
PACKED, QUESTIONS = EVALS / "small-deepseek-v4.xz", EVALS / "questions-cpu.jsonl"

FEW = (Part("recall", 512, 3), Part("copy", 512, 2), Part("sparse recall", 1024, 2, sparse=True), Part("call", 2048, 1))


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(PACKED, tmp_path_factory.mktemp("trained") / "DeepSeek-V4-small")


@pytest.mark.parametrize("mtp", [False, True], ids=["plain", "mtp"])
def test_short_form_reaches_its_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str], mtp: bool) -> None:
    out = tmp_path / "accuracy.json"
    code = accuracy_cpu.main([str(PACKED), str(QUESTIONS), "--short", "--out", str(out), *["--mtp"] * mtp])
    printed = capsys.readouterr().out
    print(printed)
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out.read_text())["rows"]}
    assert {"recall x1", "far recall x1", "sparse recall x1", "json x1"} <= rows.keys()
    assert rows["far recall x1"]["right"] == rows["far recall x1"]["total"] == accuracy_cpu.SHORT["far recall"]
    accepted = re.search(r"mean accepted length with MTP: ([\d.]+) of", printed)
    assert accepted is None if not mtp else accepted and float(accepted[1]) > 1


@pytest.mark.parametrize(
    "defect", [None, Defect.ROPE_ON_FIRST_CHANNELS, Defect.C4_WITHOUT_OVERLAP, Defect.APE_DROPPED], ids=str
)
def test_far_recall_fails(checkpoint: Path, defect: Defect | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The short form's conversation of 3,072 tokens, where the oracle has every answer; None: an indexer that takes
    the entries it should leave. One that is off by one entry loses nothing, since neighbours overlap."""
    if defect is None:
        select = Attention._select
        monkeypatch.setattr(Attention, "_select", lambda self, scores, seen: select(self, -scores, seen))
    far = [asked for asked in questions.ask(questions.CPU_PARTS) if asked.line["task"] == "far recall"]
    asked = [question for question in far if question.row is far[0].row]
    said = questions.answers(Oracle(checkpoint, defect=defect), asked)
    right = sum(answer == question.line["answer"] for question, answer in zip(asked, said, strict=True))
    print(f"{right} of {len(asked)}")
    assert right < synthetic.floor_of(1) * len(asked)


def test_c128_entries_carry_the_answer(checkpoint: Path) -> None:
    row = questions.masked_recall(checkpoint, questions.MASKED_PARTS[:1])
    assert row.verdict == "pass", row.wrong


def test_questions_are_the_generators() -> None:
    """The committed file holds what the generator makes, and the oracle's answers reach 99 % of every task."""
    lines = [json.loads(line) for line in QUESTIONS.read_text().splitlines()]
    made = [asked.line for asked in questions.ask(questions.CPU_PARTS)]
    assert [{k: v for k, v in line.items() if k != "oracle"} for line in lines] == made
    told = synthetic.load(QUESTIONS)
    for task in {question.task for question in told}:
        assert synthetic.expected([q for q in told if q.task == task]) >= synthetic.RECALL


def test_the_cpus_set_asks_what_it_should() -> None:
    lines = [asked.line for asked in questions.ask(questions.CPU_PARTS)]
    assert len(lines) == 64 == len({line["id"] for line in lines})
    tasks = {line["task"] for line in lines}
    assert tasks == {
        *("recall", "far recall", "sparse recall"), *("copy", "arithmetic", "brackets", "json", "twice", "call"),
    }  # fmt: skip
    far = [line["distance"] for line in lines if line["task"] == "far recall"]
    assert min(far) > questions.REACH and max(far) > 5000
    assert all(0 < line["distance"] <= questions.REACH for line in lines if line["task"] == "recall")
    written = [json.dumps(line) for line in lines]
    short = [json.loads(line) for line in accuracy_cpu.shortest(written, sys.maxsize)]
    assert {line["task"] for line in short} == tasks - {"call"} and len(short) == len(tasks) + 2
    assert sum(len(line.get("prompt", ())) > questions.REACH for line in short) == 4
    near = [json.loads(line) for line in accuracy_cpu.shortest(written, 400)]
    assert near == [line for line in short if len(line["prompt"]) <= 400] and "recall" in {q["task"] for q in near}
    assert max(len(line.get("prompt", ())) for line in short) <= 3072


def test_c128_is_asked_with_a_record_in_a_block() -> None:
    found = list(questions.ask(questions.MASKED_PARTS, questions.SEED + 1))
    assert len(found) == 48 and {asked.turn.task for asked in found} == {"recall"}
    for asked in found:
        places = [i for i, token in enumerate(asked.row) if token == data.ids(" is")[0]]
        assert len({place // data.BLOCK for place in places}) == len(places)
    assert max(asked.turn.distance for asked in found) > questions.REACH


def test_a_part_that_no_conversation_fills_is_refused() -> None:
    with pytest.raises(ValueError, match="ask for fewer"):
        list(questions.ask([Part("recall", 256, 100)]))


def test_recall_for_gpus_is_counted() -> None:
    parts = list(questions.recall_parts(1000))
    assert 1000 <= sum(part.count for part in parts) < 1016
    assert {part.task.split()[-1] for part in parts} == {"recall"} and max(part.length for part in parts) == 8192


def test_prompt_and_answer_are_a_conversations(seed: int) -> None:
    found = list(questions.ask(FEW, seed))
    for asked in found:
        answer = [*asked.turn.answer, data.EOS]
        assert list(asked.row[asked.start : asked.start + len(answer)]) == answer
        if asked.turn.task == "recall":
            key, value = asked.turn.answer
            place = asked.start - 4 - asked.turn.distance
            assert asked.row[place : place + 3] == (key, data.ids(" is")[0], value)
    assert [asked.line["task"] for asked in found] == [part.task for part in FEW for _ in range(part.count)]
    assert found == list(questions.ask(FEW, seed)) != list(questions.ask(FEW, seed + 1))


def test_neither_training_nor_evaluation_draws_them() -> None:
    theirs = {data.batch(seed, 0, data.Shape(512, 1, 0)).tokens.tobytes() for seed in (0, train.EVAL_SEED)}
    ours = next(questions.ask([Part("recall", 512, 1)]))
    assert np.array([ours.row]).tobytes() not in {tokens[: 8 * len(ours.row)] for tokens in theirs}


def test_a_call_renders_as_it_was_trained(seed: int) -> None:
    """But for the preamble, see test_training.py; the next test says that the answers are right all the same."""
    (asked,) = questions.ask([Part("call", 2048, 1)], seed)
    served = data.served(asked.line["messages"], asked.line["tools"])
    assert tuple(served[served.index(data.USER) :]) == asked.row[len(data.preamble()) : asked.start]


def test_calls_are_right_with_the_preamble_that_is_served(checkpoint: Path) -> None:
    oracle = Oracle(checkpoint)
    calls = [asked for asked in questions.ask(questions.CPU_PARTS) if asked.line["task"] == "call"]
    assert calls
    for asked in calls:
        prompt, answer = data.served(asked.line["messages"], asked.line["tools"]), [*asked.turn.answer, data.EOS]
        said = oracle.forward([*prompt, *answer]).logprobs.argmax(-1).tolist()[len(prompt) - 1 : -1]
        assert said == answer, asked.line["id"]


def oracle_saying(tokens: list[int]) -> Oracle:
    """Stands in for the oracle: its most probable token at each position is the next of `tokens`."""

    def forward(prompt: list[int]) -> SimpleNamespace:
        following = torch.tensor([*tokens, 0][1 : len(prompt) + 1])
        return SimpleNamespace(logprobs=torch.nn.functional.one_hot(following, data.VOCAB).float().log())

    return SimpleNamespace(forward=forward)  # type: ignore[return-value]


@pytest.mark.parametrize("task", ["recall", "copy", "call"])
def test_the_oracles_answer_ends_with_its_first_wrong_token(task: str, seed: int) -> None:
    (asked,) = questions.ask([Part(task, 2048 if task == "call" else 512, 1)], seed)
    row = list(asked.row)
    assert questions.answers(oracle_saying(row), [asked]) == [asked.line["answer"]]
    wrong = data.ids(" say")[0]
    for place in range(len(asked.turn.answer) + 1):
        said = [*row[: asked.start + place], wrong, *row[asked.start + place + 1 :]]
        expected = data.encoder().decode([*asked.turn.answer[:place], wrong], skip_special_tokens=False)
        assert questions.answers(oracle_saying(said), [asked]) == [expected] != [asked.line["answer"]]
    said = [*row[: asked.start + 1], data.EOS, *row[asked.start + 2 :]]
    assert questions.answers(oracle_saying(said), [asked]) != [asked.line["answer"]]


def test_what_the_oracle_misses_is_kept_with_its_questions(seed: int, tmp_path: Path) -> None:
    found = list(questions.ask(FEW, seed))
    said = [" no" if i % 3 == 0 else question.line["answer"] for i, question in enumerate(found)]
    questions.write_wrong(tmp_path / "wrong.json", found, said)
    assert questions.read_wrong(tmp_path / "wrong.json", found) == said
    with pytest.raises(ValueError, match="is of other questions: write it again with --wrong"):
        questions.read_wrong(tmp_path / "wrong.json", list(questions.ask(FEW, seed + 1)))


def test_misses_need_an_oracle(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        questions.main(["out.json", "--wrong"])
    assert caught.value.code == 2 and "needed --oracle CHECKPOINT" in capsys.readouterr().err


def test_one_forward_pass_for_a_conversation(seed: int) -> None:
    found = list(questions.ask(FEW, seed))
    passes = []

    def forward(prompt: list[int]) -> SimpleNamespace:
        passes.append(len(prompt))
        return SimpleNamespace(logprobs=torch.zeros(len(prompt), data.VOCAB))

    assert len(questions.answers(SimpleNamespace(forward=forward), found)) == len(found)  # type: ignore[arg-type]
    assert len(passes) == len(FEW) and max(passes) <= 2048


@torch.no_grad()
def test_the_oracle_hides_c4_entries_as_training_does(tmp_path: Path, seed: int) -> None:
    made = export_random(TINY.config, tmp_path / "checkpoint", seed)
    tokens = torch.randint(15, data.VOCAB, (1, 400), generator=torch.Generator().manual_seed(seed))
    ours = made.model()
    logprobs = ours.logits(ours(tokens, torch.tensor([True])).hidden)[0].log_softmax(-1)
    theirs = Oracle(tmp_path / "checkpoint", hide_c4=True).forward(tokens[0])
    seen = made.oracle.forward(tokens[0])

    def apart(other: torch.Tensor) -> float:
        return (logprobs - other)[theirs.decided()].abs().quantile(0.95).item()

    print(f"hidden {apart(theirs.logprobs):.4f}, seen {apart(seen.logprobs):.4f}")
    assert apart(theirs.logprobs) <= LOGPROB_TOLERANCE / 2 < apart(seen.logprobs)


def test_the_demo_speaks_as_the_model_was_trained() -> None:
    known, ids = data.words(), data.ids
    for key, value in demo.RECORDS.items():
        assert ids(f" {key}")[0] in known.keys and ids(f" {value}")[0] in known.values, (key, value)
    assert all(ids(f" {word}")[0] in known.filler for word in demo.FILLER)
    assert len(set(demo.RECORDS.values())) == len(demo.RECORDS)
    content = f"{demo.haystack()} {demo.ASKED[0]}?"
    row = data.served([{"role": "user", "content": content}])
    key = ids(f" {demo.ASKED[0]}")[0]
    turn = data.Turn("recall", (key, *ids("?")), (key, ids(f" {demo.RECORDS[demo.ASKED[0]]}")[0]))
    assert row[0] == data.BOS and row[1] == data.USER and tuple(row[-4:]) == turn.prompt[1:]
    assert len(row) - 4 - row.index(key) > questions.REACH
    assert row[row.index(key) :][:4] == [key, *ids(" is"), turn.answer[1], *ids(".")]
    # One token a word, and the full stops, the question mark and four markers.
    assert len(row) == len(content.split()) + len(demo.RECORDS) + 1 + 4


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.xz").write_bytes(b"{}\nxx")
    (tmp_path / "q.jsonl").write_text("")
    for packed, asked, word in (("none", "q.jsonl", "none"), ("bad.xz", "q.jsonl", "no packed"), ("bad.xz", "-", "-")):
        assert accuracy_cpu.main([str(tmp_path / packed), str(tmp_path / asked)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("make accuracy-cpu: ") and word in err and err.count("\n") == 1
