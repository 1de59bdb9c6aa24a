"""Needles: a pass key hidden at a depth of a long text, asked for at its end, while other long prompts are in flight.

Each prompt is its own: filler sentences of random words, the needle, and three keys of other places that must not be
told apart by their form. So no prompt shares a prefix with another, and an attention that finds *a* key is not enough.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from client import Client, Messages, Misuse, Reply, ask_all
from report import Row

LENGTHS = (4096, 16384, 65536, 262144, 1048576)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where the needle lies, as a share of the text before it."""
CONCURRENCY = (1, 8, 16)
ANSWER_TOKENS = 48
"""Room for the answer: a length is that of prompt and answer together, so that 1M fits a context of 1M."""
CLOSE = 0.97
"""A prompt has at least this share of the tokens asked for, or lacks two sentences of them."""
TRIES = 8
FLOOR = 1.0
PLACES = (
    "Aldmoor Brenwick Calder Dunmere Eastfold Farrow Glenholt Harwick Ivelstone Jarrow Kelding Lorne Marwick Norholt "
    "Oakmere Penfold Quarley Rothwick Selden Tarrant Ulverby Verwood Westerby Yarrow"
).split()
PEOPLE = "The baker,A sailor,The clerk,My neighbour,A student,The gardener,An old man,The driver,A nurse".split(",")
ACTS = "carried,painted,sold,found,counted,repaired,described,washed,forgot,measured,borrowed,drew".split(",")
THINGS = "a blue chair,two lamps,the long rope,a wooden box,some apples,the small clock,a map,three bottles".split(",")
TIMES = "in the morning,before lunch,after the rain,on Monday,near the river,in winter,by the gate,at night".split(",")


class Needle(NamedTuple):
    """One question; `key` is the right answer."""

    length: int
    depth: float
    concurrency: int
    messages: Messages
    key: str


def _sentence(rng: random.Random) -> str:
    return f"{rng.choice(PEOPLE)} {rng.choice(ACTS)} {rng.choice(THINGS)} {rng.choice(TIMES)}."


def _hide(sentences: int, depth: float, rng: random.Random) -> tuple[Messages, str]:
    """A prompt of that many filler sentences with the needle at `depth`, and its key."""
    text = [_sentence(rng) for _ in range(sentences)]
    place, *others = rng.sample(PLACES, 4)
    keys = [str(key) for key in rng.sample(range(1_000_000, 10_000_000), 4)]
    at = [(round(depth * sentences), place, keys[0])]
    at += [(rng.randint(0, sentences), other, key) for other, key in zip(others, keys[1:], strict=True)]
    for position, name, key in sorted(at, reverse=True):
        text.insert(position, f"The pass key of {name} is {key}.")
    question = f"What is the pass key of {place}? Answer with the number only."
    return [{"role": "user", "content": f"{' '.join(text)}\n\n{question}"}], keys[0]


class Haystack:
    """Makes prompts of a wanted number of tokens as the server counts them.

    Raises:
        Misuse: the server counts no tokens.
    """

    def __init__(self, client: Client) -> None:
        self._client = client
        empty, sample = (client.count(_hide(n, 0.5, random.Random(0))[0]) for n in (0, 200))
        self._fixed, self._per_sentence = empty, (sample - empty) / 200

    def needle(self, length: int, depth: float, concurrency: int, seed: str) -> Needle:
        """A prompt that leaves ANSWER_TOKENS of `length`, as CLOSE says where the server has /tokenize.

        Raises:
            Misuse: no such prompt can be made.
        """
        room = length - ANSWER_TOKENS
        # Without /tokenize a count costs a whole prefill and fills the prefix cache: one guess with a margin.
        share = 0.99 if self._client.tokenizes else 0.98
        sentences = int((room * share - self._fixed) / self._per_sentence)
        for _ in range(TRIES):
            if sentences < 1:
                break
            messages, key = _hide(sentences, depth, random.Random(seed))
            if not self._client.tokenizes:
                return Needle(length, depth, concurrency, messages, key)
            found = self._client.count(messages)
            if min(CLOSE * room, room - 2 * self._per_sentence) <= found <= room:
                return Needle(length, depth, concurrency, messages, key)
            sentences += round((room * 0.985 - found) / self._per_sentence) or (1 if found < room else -1)
        raise Misuse(f"No needle prompt of {length} tokens could be made for this server: give longer --lengths.")


def found(reply: Reply, key: str) -> bool:
    """Whether the first number of seven digits in the reply is `key`."""
    numbers = re.findall(r"(?<!\d)\d{7}(?!\d)", reply.text.replace(",", ""))
    return bool(numbers) and numbers[0] == key


def why_not(client: Client, length: int) -> str | None:
    """Why a prompt of `length` cannot be asked of this server; None when it can."""
    if client.context is not None and length > client.context:
        return f"the server's context is {client.context} tokens"
    if client.longest_prompt is not None and length - ANSWER_TOKENS > client.longest_prompt:
        return f"the server's KV pool takes prompts of {client.longest_prompt} tokens"
    return None


def refusal(client: Client, length: int, longest: int | None) -> str | None:
    """Why a length is not run: a quick run's `longest`, or what the server takes; None when it is."""
    if longest is not None and length > longest:
        return f"a quick run has needles of at most {size(longest)}"
    return why_not(client, length)


def prepare(client: Client, lengths: Sequence[int], longest: int | None) -> Haystack | None:
    """What makes the prompts of `run`, tried on the shortest; None when every length is refused.

    Raises:
        Misuse: the server counts no tokens, or the shortest length is too short for a needle.
    """
    asked = [length for length in lengths if refusal(client, length, longest) is None]
    if not asked:
        return None
    haystack = Haystack(client)
    haystack.needle(min(asked), 0.5, 1, "the shortest")
    return haystack


def run(
    client: Client,
    haystack: Haystack | None,
    lengths: Sequence[int],
    concurrency: Sequence[int],
    repeats: int,
    longest: int | None = None,
    floor: float = FLOOR,
) -> Iterable[list[Row]]:
    """The rows of each (length, concurrency), one for each depth.

    Lengths that the server cannot take, or above `longest`, are not run.

    At least `concurrency` questions are asked, so that as many are in flight.

    Raises:
        ServerGone: nothing listens any more.
    """
    for length in lengths:
        reason = refusal(client, length, longest)
        for width in concurrency:
            if reason is not None or haystack is None:
                yield [Row("needle", _name(length, depth, width), floor=floor, not_run=reason) for depth in DEPTHS]
                continue
            rounds = max(repeats, math.ceil(width / len(DEPTHS)))
            questions = [
                haystack.needle(length, depth, width, f"{length} {depth} {width} {r}")
                for r in range(rounds)
                for depth in DEPTHS
            ]
            replies = ask_all(
                lambda q: client.chat(q.messages, ANSWER_TOKENS), questions, width, f"needle {size(length)} x{width}"
            )
            yield [_row(depth, list(zip(questions, replies, strict=True)), floor) for depth in DEPTHS]


def _row(depth: float, asked: list[tuple[Needle, Reply]], floor: float) -> Row:
    mine = [(needle, reply) for needle, reply in asked if needle.depth == depth]
    first = mine[0][0]
    counts = sorted(reply.prompt_tokens for _, reply in mine if reply.prompt_tokens is not None)
    return Row(
        "needle",
        _name(first.length, depth, first.concurrency),
        right=sum(found(reply, needle.key) for needle, reply in mine),
        total=len(mine),
        floor=floor,
        wrong=[
            {"expected": needle.key, "got": reply.error or reply.text[:200]}
            for needle, reply in mine
            if not found(reply, needle.key)
        ],
        detail={"prompt_tokens": counts},
    )


def size(length: int) -> str:
    """`4K`, `1M`, or the number itself."""
    for unit, name in ((1 << 20, "M"), (1 << 10, "K")):
        if length % unit == 0:
            return f"{length // unit}{name}"
    return str(length)


def _name(length: int, depth: float, concurrency: int) -> str:
    return f"{size(length)} x{concurrency} at {depth:.0%}"
