"""Instruction following: replies that must be one JSON value and nothing else, judged by Python's JSON parser."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from client import Client, Reply, ask_all
from report import Row, same_json

FLOOR = 1.0
MAX_TOKENS = 512
ONLY = "Reply with the JSON only: no explanation, no code fence, nothing before or after it."


class Case(NamedTuple):
    """A request whose right answer is the JSON value `expected`."""

    name: str
    request: str
    expected: Any


CASES = (
    Case("flat object", 'Make a JSON object: the key "name" is set to "Ada", the key "year" to the number 1843.',
         {"name": "Ada", "year": 1843}),
    Case("list of numbers", "Make a JSON array of the first six prime numbers, smallest first.", [2, 3, 5, 7, 11, 13]),
    Case("nested", 'Make a JSON object with one key "user". Its value is an object with the key "id" set to the number '
         '7 and the key "tags" set to an array of the strings "a" and "b", in this order.',
         {"user": {"id": 7, "tags": ["a", "b"]}}),
    Case("true, false, null", 'Make a JSON object: "yes" is true, "no" is false, "nothing" is null.',
         {"yes": True, "no": False, "nothing": None}),
    Case("extraction", 'From the sentence "Mia paid 12.50 euros for 3 books in Oslo." make a JSON object with the keys '
         '"person" (string), "price" (number), "count" (number) and "city" (string).',
         {"person": "Mia", "price": 12.5, "count": 3, "city": "Oslo"}),
    Case("list of objects", 'Turn this table into a JSON array of objects with the keys "id" (number) and "fruit" '
         "(string), in the order of the rows: 1 apple; 2 pear; 3 plum.",
         [{"id": 1, "fruit": "apple"}, {"id": 2, "fruit": "pear"}, {"id": 3, "fruit": "plum"}]),
    Case("classification", 'Classify the sentiment of "I love this place." Make a JSON object with the one key '
         '"label", which is "positive" or "negative".', {"label": "positive"}),
    Case("arithmetic", 'Make a JSON object with the keys "sum" and "product", the numbers 17 + 25 and 6 * 7.',
         {"sum": 42, "product": 42}),
    Case("unicode", 'Make a JSON object with the key "city" set to "東京" and the key "dish" set to "crème brûlée".',
         {"city": "東京", "dish": "crème brûlée"}),
    Case("escapes", 'Make a JSON object with the one key "path" whose value is this string of characters: '
         'C:\\new "folder"', {"path": 'C:\\new "folder"'}),
    Case("sorting", 'Sort these words alphabetically into a JSON array of strings: pear, fig, apple, date.',
         ["apple", "date", "fig", "pear"]),
    Case("empty", 'Make a JSON object with the keys "errors", an empty array, and "meta", an empty object.',
         {"errors": [], "meta": {}}),
)  # fmt: skip


def fault(reply: Reply, expected: Any) -> str | None:
    """What is wrong with a reply; None when all of it, white space apart, is JSON that equals `expected`."""
    if reply.error is not None:
        return reply.error
    try:
        value = json.loads(reply.text)
    except ValueError as error:
        return f"not JSON only ({error}): {reply.text[:120]!r}"
    return None if same_json(value, expected) else f"another value: {reply.text[:120]!r}"


def run(client: Client, concurrency: int, floor: float = FLOOR) -> Row:
    """Every case once; raises ServerGone when nothing listens any more."""

    def ask(case: Case) -> Reply:
        return client.chat([{"role": "user", "content": f"{case.request} {ONLY}"}], MAX_TOKENS)

    replies = ask_all(ask, CASES, concurrency, "JSON only")
    faults = {case.name: fault(reply, case.expected) for case, reply in zip(CASES, replies, strict=True)}
    wrong = [
        {"case": case.name, "expected": json.dumps(case.expected, ensure_ascii=False), "got": faults[case.name]}
        for case in CASES
        if faults[case.name] is not None
    ]
    detail = {"cases": {name: fault is None for name, fault in faults.items()}}
    return Row("json", "JSON only", len(CASES) - len(wrong), len(CASES), floor=floor, wrong=wrong, detail=detail)
