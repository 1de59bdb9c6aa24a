"""Questions of the suite `synthetic`, from the training data's generator with a seed that training never draws.

python evals/questions.py OUT.jsonl --oracle CHECKPOINT    64 questions for a CPU, with the oracle's answers
python evals/questions.py OUT.jsonl --count 1000           recall alone, up to 8,192 tokens, for a GPU
python evals/questions.py OUT.json --count 1000 --oracle CHECKPOINT --wrong    what the oracle misses there

A question is a turn of a conversation after the turns before it, answered rightly: the model was trained on that, and
questions of one conversation share a prefix. The oracle therefore looks at a conversation once: it is right where each
token of the answer, and the end after it, is its most probable one; otherwise `oracle` ends with its first wrong token.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("overlay", "reference")]

import numpy as np

from report import Row
from sglang_sm120_reference.oracle import Oracle
from synthetic import RECALL
from training import data

SEED = (1 << 30) + 1
"""Training draws from small seeds, its evaluation from 1 << 30."""

REACH = 2048
"""Tokens behind the question up to which all 512 c4 entries are taken; beyond, the indexer chooses."""


class Part(NamedTuple):
    """Questions of one conversation: what they ask, its most tokens, how many.

    sparse: at most one record in a block of 128. records: the conversation has as many at least; where a block holds
    several, its c128 entry has to hold them all, so that recall rests on c4 entries and on the indexer.
    """

    task: str
    length: int
    count: int
    sparse: bool = False
    records: int = 0


CPU_PARTS = (
    Part("recall", 512, 6), Part("recall", 1024, 6),
    Part("far recall", 3072, 8, records=48), Part("far recall", 4096, 6, records=48), Part("far recall", 8192, 4),
    Part("sparse recall", 1024, 4, sparse=True), Part("sparse recall", 4096, 10, sparse=True),
    *[Part(task, 512, 2) for task in ("copy", "arithmetic", "brackets", "json") for _ in range(2)],
    Part("twice", 512, 2), Part("call", 2048, 1), Part("call", 2048, 1),
)  # fmt: skip
GPU_PARTS = (
    Part("recall", 1024, 10), Part("far recall", 3072, 5), Part("far recall", 4096, 6),
    Part("sparse recall", 4096, 16, sparse=True), Part("far recall", 8192, 8),
)  # fmt: skip
MASKED_PARTS = tuple(
    Part("sparse recall", length, count, sparse=True) for length, count in ((2048, 10), (3072, 16), (4096, 22))
)
DRAWS = 1000


@dataclass(frozen=True)
class Asked:
    """Turn `turn` (from 1) of a conversation: the tokens before its answer, and what the file says of it."""

    row: tuple[int, ...]
    start: int
    turn: data.Turn
    line: dict[str, Any]


def ask(parts: Iterable[Part], seed: int = SEED) -> Iterator[Asked]:
    """The questions of `parts`, in conversations that are drawn until one holds enough of them.

    Raises ValueError when none of `DRAWS` does.
    """
    for number, part in enumerate(parts):
        rng = np.random.default_rng([seed, number, part.length])
        drawn = (list(_conversation(rng, part, number)) for _ in range(DRAWS))
        found = next((questions for questions in drawn if len(questions) >= part.count), None)
        if found is None:
            raise ValueError(f"no conversation of {DRAWS} has the questions of {part}: ask for fewer or in more")
        # The farthest, since they are the rarest; in the conversation's order, as each extends the last.
        found.sort(key=lambda asked: -asked.turn.distance)
        yield from sorted(found[: part.count], key=lambda asked: asked.start)


def _conversation(rng: np.random.Generator, part: Part, number: int) -> Iterator[Asked]:
    """Every turn of a new conversation that `part` may ask."""
    row, marks, turns = data.conversation(rng, part.length, part.sparse)
    whole = tuple(row)
    if row.count(data.ids(" is")[0]) < part.records:
        return
    starts = [marks.index(turn) + 1 for turn in range(1, len(turns) + 1)]
    for i, (start, turn) in enumerate(zip(starts, turns, strict=True)):
        # After a call a client would send the tool's answer: the first call alone is asked.
        if not _fits(turn, part) or (turn.task == "call" and any(before.task == "call" for before in turns[:i])):
            continue
        line: dict[str, Any] = {"id": f"{number}-{i + 1}", "task": part.task, "distance": turn.distance}
        if turn.task == "call":
            # SGLang's parser gives a parameter's text as it stands.
            word = _text(turn.question[-1:])
            line |= {"messages": _messages(row, turns[: i + 1]), "tools": data.TOOLS}
            line["answer"] = json.dumps([["look", {"word": word}]])
        else:
            line |= {"prompt": row[:start], "answer": _text(turn.answer)}
        # Room for the end and for one token too many, which makes an answer wrong.
        yield Asked(whole, start, turn, {**line, "max_tokens": len(turn.answer) + 2})


def _fits(turn: data.Turn, part: Part) -> bool:
    if part.sparse or turn.task != "recall":
        return turn.task == part.task.split()[-1]
    return part.task == ("far recall" if turn.distance > REACH else "recall")


def _messages(row: list[int], turns: list[data.Turn]) -> list[dict[str, Any]]:
    """The messages of a conversation up to the question of the last of `turns`."""
    users = [i for i, token in enumerate(row) if token == data.USER]
    messages = []
    for user, turn in zip(users, turns, strict=False):
        messages.append({"role": "user", "content": _text(row[user + 1 : row.index(data.ASSISTANT, user)])})
        messages.append({"role": "assistant", "content": _text(turn.answer)})
    return messages[:-1]


def _text(ids: Iterable[int]) -> str:
    return data.encoder().decode(list(ids), skip_special_tokens=False)


def answers(oracle: Oracle, asked: list[Asked]) -> list[str]:
    """What the oracle answers; one forward pass for all questions of a conversation that follow each other."""
    said: list[str] = []
    best: list[int] = []
    for i, question in enumerate(asked):
        if i == 0 or question.row is not asked[i - 1].row:
            last = max(q.start + len(q.turn.answer) for q in asked if q.row is question.row)
            best = oracle.forward(list(question.row[:last])).logprobs.argmax(-1).tolist()
        right = [*question.turn.answer, data.EOS]
        found = best[question.start - 1 : question.start - 1 + len(right)]
        wrong = next((n for n, (a, b) in enumerate(zip(found, right, strict=True)) if a != b), None)
        ending = found[: wrong + 1] if wrong is not None else []
        said.append(question.line["answer"] if wrong is None else _text(t for t in ending if t != data.EOS))
    return said


def masked_recall(checkpoint: Path, parts: Iterable[Part] = MASKED_PARTS) -> Row:
    """The oracle's sparse recall with c4 entries hidden: what c128 entries carry. No server can be asked that."""
    asked = list(ask(parts, SEED + 1))
    said = answers(Oracle(checkpoint, hide_c4=True), asked)
    wrong = [
        {"id": q.line["id"], "distance": q.turn.distance, "expected": q.line["answer"], "got": answer}
        for q, answer in zip(asked, said, strict=True)
        if answer != q.line["answer"]
    ]
    return Row("oracle", "sparse recall, c4 hidden", len(asked) - len(wrong), len(asked), RECALL, wrong=wrong)


def recall_parts(count: int) -> Iterator[Part]:
    """Conversations with at least `count` recall questions between them, all lengths alike."""
    while count > 0:
        for part in GPU_PARTS:
            if count > 0:
                yield part
            count -= part.count


def write(out: Path, asked: list[Asked], oracle: list[str] | None = None) -> None:
    """Write the JSONL file, with the oracle's answers where they are given."""
    lines = [q.line if oracle is None else {**q.line, "oracle": oracle[i]} for i, q in enumerate(asked)]
    out.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines), encoding="utf-8")


def digest(asked: Iterable[Asked]) -> str:
    """SHA-256 of what is asked."""
    return hashlib.sha256("".join(json.dumps(q.line) for q in asked).encode()).hexdigest()


def write_wrong(out: Path, asked: list[Asked], said: list[str]) -> None:
    """Write what the oracle does not answer rightly, in a file that a thousand long questions would not fit."""
    wrong = {q.line["id"]: answer for q, answer in zip(asked, said, strict=True) if answer != q.line["answer"]}
    facts = {"questions": len(asked), "sha256": digest(asked), "wrong": wrong}
    out.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def read_wrong(file: Path, asked: list[Asked]) -> list[str]:
    """The oracle's answers to the questions that `write_wrong` was given; raises ValueError for others."""
    facts = json.loads(file.read_text(encoding="utf-8"))
    if facts["sha256"] != digest(asked):
        raise ValueError(f"{file} is of other questions: write it again with --wrong")
    return [facts["wrong"].get(q.line["id"], q.line["answer"]) for q in asked]


def main(words: list[str] | None = None) -> int:
    """Command line; 0 when written, 1 when it failed, 2 for misuse."""
    parser = argparse.ArgumentParser(prog="questions.py", description="Write questions with exact answers.")
    parser.add_argument("out", type=Path, metavar="OUT.jsonl")
    parser.add_argument("--count", type=int, metavar="N", help="recall questions, at least; without it the CPU's set")
    parser.add_argument("--oracle", type=Path, metavar="CHECKPOINT", help="add what the oracle answers")
    parser.add_argument("--wrong", action="store_true", help="write only what the oracle misses")
    arguments = parser.parse_args(words)
    if arguments.wrong and not arguments.oracle:
        parser.error("--wrong has no oracle, needed --oracle CHECKPOINT")
    if arguments.count is not None and arguments.count < 1:
        parser.error(f"--count is {arguments.count}, needed at least 1")
    asked = list(ask(CPU_PARTS if arguments.count is None else recall_parts(arguments.count)))
    began = time.monotonic()
    try:
        said = answers(Oracle(arguments.oracle), asked) if arguments.oracle else None
        if said and arguments.wrong:
            write_wrong(arguments.out, asked, said)
        else:
            write(arguments.out, asked, said)
    except (OSError, ValueError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    tokens = sum(q.start for q in asked)
    print(f"{arguments.out}: {len(asked)} questions, {tokens:,} tokens, {arguments.out.stat().st_size:,} bytes")
    if said:
        right: dict[str, list[bool]] = {}
        for question, answer in zip(asked, said, strict=True):
            right.setdefault(question.line["task"], []).append(answer == question.line["answer"])
        for task, found in right.items():
            print(f"{task}: the oracle has {sum(found)} of {len(found)}")
        print(f"{time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
