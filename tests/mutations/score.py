"""What the oracle answers: the accuracy suite's recall questions, few enough for one CPU core and every defect.

    python -m mutations.score CHECKPOINT QUESTIONS

prints {"right": 7, "asked": 8}. Run in a process of its own, because the oracle's source is what a mutation changes.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from client import Misuse
from sglang_sm120_reference.oracle import Oracle
from synthetic import Question, load

ASKED = 8
LONGEST = 3072
"""Tokens of a prompt: from 2,052 on the indexer has to choose, and a forward pass takes seconds."""
END = 1
"""The end-of-sentence token of every checkpoint that the reference's `write` makes."""


class Score(NamedTuple):
    """How many of the questions were answered right."""

    right: int
    asked: int

    def __str__(self) -> str:
        return f"{self.right} of {self.asked}"


def accuracy(checkpoint: Path, questions: Sequence[Question]) -> Score:
    """The oracle's greedy answers to these questions, all of which have a `prompt`."""
    oracle = Oracle(checkpoint)
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return Score(sum(_answers(oracle, tokenizer, question) for question in questions), len(questions))


def chosen(questions: Sequence[Question], tokenizer: Tokenizer) -> list[Question]:
    """Recall questions from the nearest to the farthest, evenly.

    Raises:
        Misuse: the file has fewer than ASKED that are short enough.
    """
    recall = [q for q in questions if q.distance > 0 and q.prompt is not None and len(_ids(q, tokenizer)) <= LONGEST]
    if len(recall) < ASKED:
        raise Misuse(
            f"{len(recall)} questions have a distance, a prompt and at most {LONGEST} tokens, needed {ASKED}: "
            "name a file with more of them."
        )
    recall.sort(key=lambda question: (question.distance, question.id))
    return [recall[i * (len(recall) - 1) // (ASKED - 1)] for i in range(ASKED)]


def _ids(question: Question, tokenizer: Tokenizer) -> list[int]:
    prompt = question.prompt or ""
    return tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt


def _answers(oracle: Oracle, tokenizer: Tokenizer, question: Question) -> bool:
    """Token by token, and no further than the answer's beginning is right."""
    prompt, reply, text, expected = _ids(question, tokenizer), [], "", question.answer.strip()
    for _ in range(question.max_tokens):
        token = int(oracle.forward([*prompt, *reply]).logprobs[-1].argmax())
        if token == END:
            break
        reply.append(token)
        text = tokenizer.decode(reply).strip()
        if any(stop in text for stop in question.stop or ()):
            text = min((text.partition(stop)[0] for stop in question.stop or ()), key=len).strip()
            break
        if not expected.startswith(text):
            break
    return text == expected


def main() -> None:
    """Print the score of the checkpoint and the questions that the command line names."""
    checkpoint, file = map(Path, sys.argv[1:])
    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    print(json.dumps(accuracy(checkpoint, chosen(load(file), tokenizer))._asdict()))


if __name__ == "__main__":
    main()
