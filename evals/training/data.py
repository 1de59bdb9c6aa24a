"""Conversations with exact answers, as token ids in SGLang's DeepSeek-V4 chat encoding.

A conversation is one haystack (words without meaning, with records " KEY is VALUE." among them) and then turns, each a
question and its answer; only answers are trained. One token is one id of `reference.tokenizer`: words that the
tokenizer knows are split into keys, values and filler, so that a key's record is never guessed from the word itself.
A recall answer repeats the key first: the value is then predicted at a token that is the key.

| turn | question | answer |
|---|---|---|
| recall | " small?" | " small green", the key and the value of its record " small is green." |
| copy | " say small green" | " small green" |
| arithmetic | "7+8%5=" | "0" |
| brackets | "([{}" | "])" |
| json | "json small" | '{"word":" small"}' |
| twice | "twice small" | " small small" |
| call | "call small" | the DSML tool call look(word=" small"); only after the preamble that declares the tool |

The tool preamble is what SGLang renders for `TOOLS`; `preamble.json` holds its ids, so that training needs no SGLang.
It is that of SGLang 0.5.12.post1, with which the committed weights were trained; they answer behind 0.5.23's as well.
For a new training `python evals/training/data.py` writes it again and prints its length.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[2] / folder) for folder in ("evals", "overlay", "reference")]

import numpy as np
from tokenizers import Tokenizer

from sglang_sm120_reference import tokenizer

VOCAB = 640
"""The smallest round vocabulary that holds every word of the tokenizer."""

BLOCK = 128
"""Tokens of a c128 entry: sparse records do not straddle its border, since an entry holds what its block holds."""

BOS, EOS, PAD, USER, ASSISTANT = range(5)
KEYS, VALUES = 56, 56
RECORD = 4
"""Tokens of " KEY is VALUE."."""

PREAMBLE = Path(__file__).with_name("preamble.json")

# In the order and with the defaults in which SGLang's server renders a request's tools.
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "description": "look up a word",
            "name": "look",
            "parameters": {"type": "object", "properties": {"word": {"type": "string"}}, "required": ["word"]},
            "strict": False,
        },
    }
]

CLOSING = {"(": ")", "[": "]", "{": "}", "<": ">"}
MODULI = (5, 7, 10)
MAX_COPY = 24
MAX_DEPTH = 6


class Words(NamedTuple):
    """Ids of the words by role. said: values and filler, what copies and instructions are about; a key is said in its
    record and when it is asked for alone, so that nothing but its record matches it."""

    keys: np.ndarray
    values: np.ndarray
    filler: np.ndarray
    said: np.ndarray


@functools.cache
def encoder() -> Tokenizer:
    """The tokenizer of the trained checkpoint."""
    return tokenizer.build(VOCAB)


@functools.cache
def ids(text: str) -> tuple[int, ...]:
    """Token ids of a piece of text; pieces that the tokenizer would merge must be given together."""
    return tuple(encoder().encode(text).ids)


@functools.cache
def words() -> Words:
    """The single-token words in the tokenizer's order, without " is" and " say", which are part of the formats."""
    vocabulary, merges = tokenizer.vocabulary(VOCAB)
    prefixes = {left for left, _ in merges}
    whole = [i for token, i in vocabulary.items() if token.startswith("Ġ") and len(token) > 2 and token not in prefixes]
    whole = [i for i in whole if i not in (*ids(" is"), *ids(" say"))]
    order = np.random.default_rng(0).permutation(len(whole))
    found = np.array(whole)[order]
    return Words(found[:KEYS], found[KEYS : KEYS + VALUES], found[KEYS + VALUES :], found[KEYS:])


@functools.cache
def preamble() -> tuple[int, ...]:
    """Ids of the rendered system message that declares `TOOLS`, the begin-of-sentence token first."""
    return tuple(json.loads(PREAMBLE.read_text())["ids"])


@dataclass
class Turn:
    """One question and its answer. distance: tokens from the record to the question, for recall only."""

    task: str
    question: tuple[int, ...]
    answer: tuple[int, ...]
    distance: int = 0

    @property
    def prompt(self) -> tuple[int, ...]:
        """The user's message and the assistant's header."""
        return (USER, *self.question, ASSISTANT, *ids("</think>"))


@dataclass
class Batch:
    """tokens int64 [B, L], padded. answer int64 [B, L]: at each position the turn (from 1) whose answer the next
    token belongs to, 0 elsewhere. hide_c4 bool [B]. turns[b][n - 1] describes turn n of sequence b."""

    tokens: np.ndarray
    answer: np.ndarray
    hide_c4: np.ndarray
    turns: list[list[Turn]]


class Shape(NamedTuple):
    """One kind of batch: tokens per sequence, sequences, and how many of them, on average, have c4 entries hidden."""

    length: int
    batch: int
    hidden: float


def batch(seed: int, step: int, shape: Shape) -> Batch:
    """Batch `step` of a run; equal arguments give equal tokens."""
    rng = np.random.default_rng([seed, step, shape.length])
    tokens = np.full((shape.batch, shape.length), PAD, dtype=np.int64)
    answer = np.zeros_like(tokens)
    hide = np.arange(shape.batch) < int(shape.hidden + rng.random())
    turns = []
    for b in range(shape.batch):
        row, marks, told = conversation(rng, shape.length, bool(hide[b]))
        tokens[b, : len(row)], answer[b, : len(row)] = row, marks
        turns.append(told)
    return Batch(tokens, answer, hide, turns)


def conversation(rng: np.random.Generator, length: int, sparse: bool) -> tuple[list[int], list[int], list[Turn]]:
    """Tokens, answer marks (see `Batch`) and turns of one conversation of at most `length` tokens.

    sparse: at most one record in each aligned block of 128 tokens, and recall alone is asked.
    """
    call = not sparse and length >= 2 * len(preamble()) and rng.random() < 0.3
    row = list(preamble()) if call else [BOS]
    kind = rng.random()
    records: dict[int, tuple[int, int]] = {}
    opening: list[int] = []
    if sparse or (not call and kind < 0.7):
        share = rng.uniform(0.5, 0.8) if length <= 1024 else max(0.75, 1 - 1024 / length)
        opening, records = haystack(rng, int(length * share), len(row) + 1, sparse)
    row, marks = [*row], [0] * len(row)
    turns: list[Turn] = []
    asked = list(rng.permutation(list(records))) if records else []
    while True:
        turn = _turn(rng, records, asked, call, sparse)
        if turn is None:
            break
        prompt = list(turn.prompt)
        if opening:
            prompt[1:1] = opening
            opening = []
        if len(row) + len(prompt) + len(turn.answer) + 1 > length:
            break
        if turn.task == "recall":
            turn.distance = len(row) + len(prompt) - 4 - records[turn.question[0]][1]
        turns.append(turn)
        row += prompt + [*turn.answer, EOS]
        # The last token of the prompt predicts the first of the answer, the last of the answer the end.
        marks += [0] * (len(prompt) - 1) + [len(turns)] * (len(turn.answer) + 1) + [0]
    return row, marks, turns


def haystack(
    rng: np.random.Generator, length: int, start: int, sparse: bool
) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """Filler with records, `length` tokens of which the first is at position `start`; key -> (value, position)."""
    known = words()
    text = rng.choice(known.filler, length)
    if sparse:
        blocks = np.arange(-(-start // BLOCK), (start + length) // BLOCK) * BLOCK
        blocks = rng.permutation(blocks)[:KEYS]
        places = blocks + rng.integers(0, BLOCK - RECORD + 1, len(blocks)) - start
    else:
        most = min(KEYS, length // (2 * RECORD))
        grid = rng.permutation(length // RECORD)[: rng.integers(min(4, most), most + 1)]
        places = grid * RECORD + rng.integers(0, length % RECORD + 1)
    keys = rng.permutation(known.keys)[: len(places)]
    values = rng.choice(known.values, len(places))
    (link,), (stop,) = ids(" is"), ids(".")
    for i, word in enumerate((keys, link, values, stop)):
        text[places + i] = word
    found = zip(keys.tolist(), values.tolist(), (places + start).tolist(), strict=True)
    return text.tolist(), {key: (value, place) for key, value, place in found}


def _turn(
    rng: np.random.Generator, records: dict[int, tuple[int, int]], asked: list[int], call: bool, sparse: bool
) -> Turn | None:
    """The next turn; each record is asked for once. None when there is nothing left to ask."""
    if asked and (sparse or rng.random() < 0.75):
        key = int(asked.pop())
        return Turn("recall", (key, *ids("?")), (key, records[key][0]))
    if sparse:
        return None
    tasks = [copying, arithmetic, brackets, as_json, twice, *([tool_call] * 4 if call else [])]
    return tasks[rng.integers(len(tasks))](rng)


def copying(rng: np.random.Generator) -> Turn:
    """Repeat up to 24 words."""
    chosen = tuple(rng.permutation(words().said)[: rng.integers(2, MAX_COPY + 1)].tolist())
    return Turn("copy", (*ids(" say"), *chosen), chosen)


def arithmetic(rng: np.random.Generator) -> Turn:
    """(a + b), (a - b) or (a x b) modulo 5, 7 or 10, digits a and b."""
    a, b = rng.integers(0, 10, 2).tolist()
    sign, modulus = "+-*"[rng.integers(3)], MODULI[rng.integers(len(MODULI))]
    result = {"+": a + b, "-": a - b, "*": a * b}[sign] % modulus
    return Turn("arithmetic", ids(f"{a}{sign}{b}%{modulus}="), ids(str(result)))


def brackets(rng: np.random.Generator) -> Turn:
    """Close what is open: up to 6 deep, up to 24 characters."""
    text, still = "", ""
    target = rng.integers(1, 25)
    while len(text) < target or not still:
        if still and (len(still) == MAX_DEPTH or rng.random() < 0.4):
            text, still = text + CLOSING[still[-1]], still[:-1]
        else:
            opened = list(CLOSING)[rng.integers(4)]
            text, still = text + opened, still + opened
    return Turn("brackets", ids(text), ids("".join(CLOSING[c] for c in reversed(still))))


def as_json(rng: np.random.Generator) -> Turn:
    """Answer in JSON only."""
    word = _word(rng)
    return Turn("json", (*ids("json"), word), (*ids('{"word":"'), word, *ids('"}')))


def twice(rng: np.random.Generator) -> Turn:
    """Say a word twice."""
    word = _word(rng)
    return Turn("twice", (*ids("twice"), word), (word, word))


def tool_call(rng: np.random.Generator) -> Turn:
    """Call the tool: the DSML block that SGLang's parser reads."""
    word = _word(rng)
    before = '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="look">\n<｜DSML｜parameter name="word" string="true">'
    after = "</｜DSML｜parameter>\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>"
    return Turn("call", (*ids("call"), word), (*ids(before), word, *ids(after)))


def _word(rng: np.random.Generator) -> int:
    return int(words().said[rng.integers(len(words().said))])


@functools.cache
def sglang_recipe() -> Any:
    """SGLang's DeepSeek-V4 chat encoding; its module is loaded from its file, as the package takes half a minute."""
    package = importlib.util.find_spec("sglang")
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("SGLang is not installed, its encoding is needed to render prompts: run `make setup`")
    path = Path(package.submodule_search_locations[0]) / "srt/parser/deepseek_recipe_renderer.py"
    spec = importlib.util.spec_from_file_location("deepseek_recipe_renderer", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DeepSeekRecipe("dsv4", encoder())


def served(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None = None) -> list[int]:
    """Ids of the prompt that SGLang makes of a chat request without thinking."""
    body = {"messages": messages, "thinking": False} | ({"tools": tools} if tools else {})
    found: list[int] = sglang_recipe().encode(body)
    return found


def rendered_preamble() -> list[int]:
    """What SGLang puts before the first user's message of a request with `TOOLS`."""
    found = served([{"role": "user", "content": ""}], TOOLS)
    return found[: found.index(USER)]


if __name__ == "__main__":
    PREAMBLE.write_text(json.dumps({"ids": rendered_preamble()}) + "\n")
    print(f"{PREAMBLE}: {len(rendered_preamble())} tokens")
