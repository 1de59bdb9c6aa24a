"""The project's own tasks, from a JSONL file that the trained small model's generator writes: answers are exact.

One object a line:

    id        unlike any other
    prompt    text or a list of token ids, for /v1/completions; or
    messages  for /v1/chat/completions
    answer    the text that is right
    task      what is asked: rows of one task are scored together
    distance  tokens between what must be recalled and the question, 0 where nothing is
    oracle    optional: what the whole-model oracle answers; every row of a task has it or none
    tools     optional, beside messages: OpenAI's tool definitions
    max_tokens, stop   optional: 32 and none unless given

A reply is right when it equals `answer`, white space at its ends apart; with tools, when its calls are those of
`answer`, which is a JSON list such as [["look", {"word": "small"}]] then. The expected score of a task is the share of
its questions where `oracle` is `answer`, and 1 without `oracle`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from client import Client, Messages, Misuse, Reply, ask_all
from report import Row
from tools import same_calls

MAX_TOKENS = 32
SLACK = 0.005
"""A provider may lose half a point against what is expected."""
RECALL = 0.99
"""And where 99 % are expected, 99 % are needed."""


class Question(NamedTuple):
    """A line of the file."""

    id: str
    task: str
    distance: int
    answer: str
    prompt: str | list[int] | None
    messages: Messages | None
    oracle: str | None
    tools: list[dict[str, Any]] | None
    max_tokens: int
    stop: Sequence[str] | None


def load(path: Path) -> list[Question]:
    """The questions of a file.

    Raises:
        Misuse: it cannot be read, or a line is not as above.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise Misuse(f"{path} cannot be read ({error}): name a JSONL file with --synthetic.") from None
    questions = [_question(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not questions:
        raise Misuse(f"{path} has no questions: name another file with --synthetic.")
    if len({question.id for question in questions}) < len(questions):
        raise Misuse(f"{path} has an id twice: give each question its own.")
    for task in {question.task for question in questions}:
        if len({question.oracle is None for question in questions if question.task == task}) > 1:
            raise Misuse(f"{path}: some questions of task {task} have `oracle`, some not: give it to all or to none.")
    return questions


def _question(line: str, where: str) -> Question:
    try:
        facts = json.loads(line)
    except ValueError as error:
        raise Misuse(f"{where} is not JSON ({error}): correct it.") from None
    if not isinstance(facts, dict):
        raise Misuse(f"{where} is a {type(facts).__name__}, needed an object: correct it.")
    kinds: dict[str, type | tuple[type, ...]] = {
        "id": str, "task": str, "distance": int, "answer": str, "prompt": (str, list), "messages": list,
        "oracle": str, "tools": list, "max_tokens": int, "stop": list,
    }  # fmt: skip
    for name, value in facts.items():
        if name in kinds and (not isinstance(value, kinds[name]) or isinstance(value, bool)):
            raise Misuse(f"{where}: {name} is {value!r:.80}, which is of the wrong kind: correct it.")
    missing = [name for name in ("id", "task", "distance", "answer") if name not in facts]
    if missing or ("prompt" in facts) == ("messages" in facts):
        lacking = ", ".join(missing) or "exactly one of prompt and messages"
        raise Misuse(f"{where} lacks {lacking}: correct it.")
    if "tools" in facts and ("messages" not in facts or not _calls(facts["answer"])):
        raise Misuse(
            f"{where} has tools, and needs messages and an answer of the form [[NAME, ARGUMENTS]]: correct it."
        )
    known: dict[str, Any] = {name: facts.get(name) for name in Question._fields}
    return Question(**known | {"max_tokens": facts.get("max_tokens", MAX_TOKENS)})


def _calls(answer: str) -> list[tuple[str, dict[str, Any]]]:
    """The calls of an answer, none when it has no such form."""
    try:
        found = json.loads(answer)
    except ValueError:
        return []
    pairs = found if isinstance(found, list) else []
    good = all(isinstance(p, list) and len(p) == 2 and isinstance(p[0], str) and isinstance(p[1], dict) for p in pairs)
    return [(name, arguments) for name, arguments in pairs] if good else []


def right(reply: Reply, question: Question) -> bool:
    """Whether the reply is the question's answer."""
    if question.tools:
        return reply.error is None and same_calls(reply.calls, _calls(question.answer))
    return reply.error is None and not reply.calls and reply.text.strip() == question.answer.strip()


def expected(questions: Sequence[Question]) -> float:
    """The share of one task's questions that the oracle answers right, 1 without its answers."""
    if questions[0].oracle is None:
        return 1.0
    return sum(q.oracle is not None and q.oracle.strip() == q.answer.strip() for q in questions) / len(questions)


def floor_of(share: float) -> float:
    """The floor for an expected share."""
    return max(share - SLACK, RECALL if share >= RECALL else 0.0)


def run(
    client: Client, questions: Sequence[Question], concurrency: Sequence[int], floor: float | None = None
) -> Iterable[list[Row]]:
    """A row for each task, once for each concurrency; raises ServerGone when nothing listens any more."""

    def ask(question: Question) -> Reply:
        if question.prompt is not None:
            return client.complete(question.prompt, question.max_tokens, question.stop)
        more: dict[str, Any] = {"stop": list(question.stop)} if question.stop else {}
        if question.tools:
            more["tools"] = question.tools
        return client.chat(question.messages or (), question.max_tokens, **more)

    for width in concurrency:
        replies = ask_all(ask, questions, width, f"synthetic x{width}")
        asked = list(zip(questions, replies, strict=True))
        rows = []
        for task in dict.fromkeys(question.task for question in questions):
            mine = [(question, reply) for question, reply in asked if question.task == task]
            rows.append(_row(f"{task} x{width}", mine, floor))
        yield rows


def _said(reply: Reply) -> str:
    return ", ".join(f"{call.name}({call.arguments})" for call in reply.calls) or reply.text[:200]


def _row(name: str, asked: Sequence[tuple[Question, Reply]], floor: float | None) -> Row:
    share = expected([question for question, _ in asked])
    # By powers of two, so that 2,049 tokens do not count with 2,048.
    by_distance: dict[int, list[int]] = {}
    for question, reply in sorted(asked, key=lambda pair: pair[0].distance):
        counts = by_distance.setdefault(1 << (question.distance - 1).bit_length() if question.distance else 0, [0, 0])
        counts[0] += right(reply, question)
        counts[1] += 1
    return Row(
        "synthetic",
        name,
        right=sum(right(reply, question) for question, reply in asked),
        total=len(asked),
        floor=floor_of(share) if floor is None else floor,
        wrong=[
            {"id": q.id, "distance": q.distance, "expected": q.answer, "got": reply.error or _said(reply)}
            for q, reply in asked
            if not right(reply, q)
        ],
        detail={"expected": share, "right_of_total_by_distance": by_distance},
    )
