"""What `make soak` asks: requests of drawn lengths, kinds and ends, sixteen at once, and whether each answer is right.

A greedy prompt is a question as the model was trained on it, asked of the quiet server first: its answer is decided by
margins, so that rounding in another batch seldom changes it. Other prompts are new words, half of them behind the head
of a greedy prompt, which the prefix cache holds. Sampled answers must have the tokens asked for, structured ones match.
"""

from __future__ import annotations

import json
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import numpy as np

from streamed import events
from training import data

MEDIAN, LONGEST = 150, 2048
SHORTEST = MEDIAN**2 / LONGEST
"""Lengths are log-uniform between these, so that half of them lie below the median."""
LONG = 20_000
FIRST_LONG, EVERY = 10, 100
"""Which requests have that many tokens: every other one is known to the prefix cache, unless others took its pages."""
KNOWN = 24
"""Greedy prompts, a long one beside them."""
NEW = 24
"""Tokens of a greedy answer; other answers have up to twice as many."""
ROOM = 40
"""A conversation so much longer than wanted has a question at about the wanted length."""
AT_ONCE = 16
TIMEOUT_S = 600
"""For one answer: it may wait behind several prompts of 20,000 tokens, which take minutes on a busy CPU."""
KINDS = {"greedy": 40, "sampled": 35, "structured": 25}
ENDS = {"whole": 65, "aborted": 20, "half-closed": 15}
"""How a request ends, by weight: its answer is read to the end; the connection is closed after some tokens; the client
tells that it sends no more after some tokens, and reads on, which SGLang's HTTP server takes for a client that left."""
TOLERANCE = 0.05
"""Of a log-probability: a pass with other rows rounds otherwise (as between servers in tests/gpu/test_server.py)."""
TIE = 2 * TOLERANCE
"""Two tokens nearer to each other may change places."""
MIN_WITHIN = 0.97
"""Share of log-probabilities within it: rounding may choose another expert (as in tests/model/test_eagle_cpu.py)."""
WORDS = [" water", " sound", " people", " help"]
SCHEMA = {"type": "object", "properties": {"word": {"enum": WORDS}, "last": {"type": "boolean"}},
          "required": ["word", "last"], "additionalProperties": False}  # fmt: skip
REGEX = r"(water|sound|people)( (say|is) [0-9]{2,4}){1,3}\."


class Ask(NamedTuple):
    """One request. after: tokens that are read before the client leaves. known: which greedy prompt it is."""

    kind: str
    end: str
    prompt: tuple[int, ...]
    new: int
    stream: bool
    after: int = 0
    known: int | None = None
    grammar: str | None = None


class Answer(NamedTuple):
    """What had come by the end. values: log-probability of each token; gaps: how far the best two were apart there."""

    tokens: list[int] = []
    values: list[float] = []
    gaps: list[float] = []
    text: str = ""
    finish: str | None = None
    cached: int = 0


def drawn_length(rng: random.Random) -> int:
    """Log-uniform tokens of a prompt."""
    return round(SHORTEST * (LONGEST / SHORTEST) ** rng.random())


def question(rng: random.Random, length: int) -> tuple[int, ...]:
    """A conversation of about so many tokens up to its last question's answer."""
    numbers = np.random.default_rng(rng.getrandbits(64))
    while True:
        row, marks, turns = data.conversation(numbers, length + ROOM, False)
        if turns:
            return tuple(row[: marks.index(len(turns)) + 1])


def questions(rng: random.Random, count: int = KNOWN) -> list[tuple[int, ...]]:
    """The greedy prompts, a long one last."""
    return [question(rng, length) for length in [*(drawn_length(rng) for _ in range(count)), LONG - ROOM]]


def draw(rng: random.Random, number: int, known: Sequence[tuple[int, ...]]) -> Ask:
    """Request `number` of a soak, given the greedy prompts."""
    is_long = number % EVERY == FIRST_LONG
    [kind] = rng.choices(list(KINDS), list(KINDS.values()))
    [end] = rng.choices(list(ENDS), list(ENDS.values()))
    if is_long:
        kind, end = ("greedy", "sampled")[number // EVERY % 2], "whole"
    stream = end != "whole" or rng.random() < 0.5
    if kind == "greedy":
        chosen = len(known) - 1 if is_long else rng.randrange(len(known) - 1)
        return Ask(kind, end, known[chosen], NEW, stream, rng.randrange(NEW), chosen)
    length = LONG if is_long else drawn_length(rng)
    longer = [prompt for prompt in known[:-1] if len(prompt) >= length]
    head = rng.choice(longer)[: length - 1] if longer and rng.random() < 0.5 else ()
    prompt = (*head, *(rng.randrange(data.ASSISTANT + 1, data.VOCAB) for _ in range(length - len(head))))
    new = rng.randint(1, 2 * NEW)
    grammar = rng.choice(["json_schema", "regex"]) if kind == "structured" else None
    return Ask(kind, end, prompt, new, stream, rng.randrange(new), grammar=grammar)


def body(ask: Ask) -> dict[str, Any]:
    """The request as /generate takes it."""
    sampling: dict[str, Any] = {"max_new_tokens": ask.new}
    if ask.kind == "greedy":
        sampling |= {"temperature": 0, "ignore_eos": True}
    elif ask.kind == "sampled":
        sampling |= {"temperature": 1.0, "top_p": 0.9, "ignore_eos": True}
    else:
        sampling |= {
            "temperature": 1.0,
            str(ask.grammar): json.dumps(SCHEMA) if ask.grammar == "json_schema" else REGEX,
        }
    more = {"return_logprob": True, "top_logprobs_num": 2} if ask.kind == "greedy" else {}
    return {"input_ids": ask.prompt, "sampling_params": sampling, "stream": ask.stream, **more}


def answer_of(reply: dict[str, Any]) -> Answer:
    """Read a /generate response, or the last chunk of a streamed one."""
    meta = reply["meta_info"]
    best = [first[0] - second[0] for first, second, *_ in meta.get("output_top_logprobs", ())]
    values = [entry[0] for entry in meta.get("output_token_logprobs", ())]
    finish = (meta["finish_reason"] or {}).get("type")
    return Answer(reply["output_ids"], values, best, reply["text"], finish, meta["cached_tokens"])


def send(client: httpx.Client, url: str, ask: Ask) -> Answer:
    """Send a request and end it as it says.

    Raises:
        httpx.HTTPError, RuntimeError, OSError: the server refused it, broke it off or did not answer.
        ValueError, LookupError: its answer is not one of /generate.
    """
    if ask.end == "half-closed":
        return _half_closed(url, ask)
    if not ask.stream:
        response = client.post(f"{url}/generate", json=body(ask))
        response.raise_for_status()
        return answer_of(response.json())
    answer = Answer()
    with client.stream("POST", f"{url}/generate", json=body(ask)) as response:
        response.raise_for_status()
        for chunk in events(response):
            answer = answer_of(chunk)
            if ask.end == "aborted" and len(answer.tokens) > ask.after:
                break
    return answer


def _half_closed(url: str, ask: Ask) -> Answer:
    address, content = urlsplit(url), json.dumps(body(ask)).encode()
    head = (
        f"POST /generate HTTP/1.1\r\nHost: {address.netloc}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    got, told = b"", False
    with socket.create_connection((address.hostname, address.port), TIMEOUT_S) as stream:
        stream.sendall(head.encode() + content)
        while True:
            # Each token is an event.
            if not told and got.count(b"data: ") >= ask.after:
                stream.shutdown(socket.SHUT_WR)
                told = True
            try:
                more = stream.recv(1 << 16)
            except ConnectionResetError:
                # A server that takes us for gone may close with the request unread.
                break
            if not more:
                break
            got += more
    chunks = [line[5:] for line in got.split(b"\n") if line.startswith(b"data: {") and line.endswith(b"}")]
    if any(b'"error"' in chunk for chunk in chunks) or (got and not re.match(rb"HTTP/1\.\d 200 ", got)):
        raise RuntimeError(f"a half-closed request was answered with {got[:300]!r}")
    return answer_of(json.loads(chunks[-1])) if chunks else Answer()


def apart(found: Answer, quiet: Answer) -> int | None:
    """The first token that differs from the quiet server's though no tie comes up to there; None where none does."""
    for place, (token, expected, gap) in enumerate(zip(found.tokens, quiet.tokens, quiet.gaps, strict=False)):
        if gap < TIE:
            return None
        if token != expected:
            return place
    return None


def errors(found: Answer, quiet: Answer) -> Iterator[float]:
    """How far log-probabilities are from the quiet server's, as long as tokens are the same."""
    pairs = zip(found.tokens, quiet.tokens, found.values, quiet.values, strict=False)
    for token, expected, value, was in pairs:
        if token != expected:
            return
        yield abs(value - was)


def problem(ask: Ask, answer: Answer, quiet: Answer | None) -> str | None:
    """Why an answer is wrong, None when it is right; of a client that left, what had come is judged."""
    tokens = len(answer.tokens)
    if any(not 0 <= token < data.VOCAB for token in answer.tokens) or tokens > ask.new:
        return f"{tokens} tokens of {ask.new}, or some outside of the vocabulary: {answer.tokens}"
    if quiet is not None and (place := apart(answer, quiet)) is not None:
        return f"token {place} is {answer.tokens[place]}, alone it was {quiet.tokens[place]} by {quiet.gaps[place]:.2f}"
    if ask.end != "whole":
        return None
    if answer.finish != "stop":
        return None if tokens == ask.new and answer.finish == "length" else f"{answer.finish} after {tokens} tokens"
    if ask.grammar is None:
        return f"stopped after {tokens} of {ask.new} tokens"
    return None if _matches(ask.grammar, answer.text) else f"{answer.text!r} is not by its {ask.grammar}"


def _matches(grammar: str, text: str) -> bool:
    if grammar == "regex":
        return re.fullmatch(REGEX, text) is not None
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return found.keys() == set(SCHEMA["required"]) and found["word"] in WORDS and isinstance(found["last"], bool)


@dataclass
class Figures:
    """What came of a load. sent: requests by (kind, end). near: log-probabilities of greedy answers within
    `TOLERANCE` of the quiet server's, of `compared`. wrong, lost: a line each."""

    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    prompt_tokens: int = 0
    cached_tokens: int = 0
    hits: int = 0
    new_tokens: int = 0
    long: int = 0
    seconds: float = 0
    near: int = 0
    compared: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def take(self, ask: Ask, answer: Answer, quiet: Answer | None) -> None:
        """Count a request that came to `answer`."""
        self.sent[ask.kind, ask.end] += 1
        self.prompt_tokens += len(ask.prompt)
        self.cached_tokens += answer.cached
        self.hits += answer.cached > 0
        self.new_tokens += len(answer.tokens)
        self.long += len(ask.prompt) > LONGEST + ROOM
        if why := problem(ask, answer, quiet):
            self.wrong.append(f"{ask.kind}, {ask.end}, prompt of {len(ask.prompt)} tokens: {why}")
        if quiet is not None:
            found = list(errors(answer, quiet))
            self.compared += len(found)
            self.near += sum(error <= TOLERANCE for error in found)


class Load:
    """Requests to the server at `url` until `seconds` or `requests` are over, or until it is not `alive`.

    known: the greedy prompts; quiet: what the server answered to each of them alone.
    """

    def __init__(
        self, url: str, known: Sequence[tuple[int, ...]], quiet: Sequence[Answer], seconds: float, requests: float,
        rng: random.Random, alive: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.figures = Figures()
        self._url, self._known, self._quiet, self._rng, self._alive = url, known, quiet, rng, alive
        self._seconds, self._requests = seconds, requests
        self._number = 0
        self._began = time.monotonic()
        self._lock = threading.Lock()

    def share(self) -> float:
        """How much of it is over, 1 at the end."""
        if self._number >= self._requests:
            return 1.0
        return max((time.monotonic() - self._began) / self._seconds, self._number / self._requests)

    def stop(self) -> None:
        """Send no more."""
        self._requests = 0

    def work(self) -> None:
        """Send requests one after the other; each of the threads that do makes one more that is in flight."""
        with httpx.Client(timeout=TIMEOUT_S, trust_env=False) as client:
            while self._alive():
                with self._lock:
                    if self.share() >= 1:
                        break
                    ask = draw(self._rng, self._number, self._known)
                    self._number += 1
                self._one(client, ask)
        self.figures.seconds = time.monotonic() - self._began

    def _one(self, client: httpx.Client, ask: Ask) -> None:
        try:
            answer = send(client, self._url, ask)
        except (httpx.HTTPError, RuntimeError, OSError, ValueError, LookupError) as error:
            with self._lock:
                self.figures.lost.append(f"{ask.kind}, {ask.end}, prompt of {len(ask.prompt)} tokens: {error!r}")
            return
        with self._lock:
            self.figures.take(ask, answer, None if ask.known is None else self._quiet[ask.known])
