"""`make demo`: a small DeepSeek-V4 checkpoint, the real SGLang server on CPU, and a few requests as a user sends them.

    python evals/demo.py PACKED

PACKED is a trained checkpoint as `sglang_sm120_reference.packed` writes it: it has learned to recall words from far
back, and the demo fails when it does not.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parents[1] / "reference")]

import httpx
from openai import DefaultHttpxClient, OpenAI, OpenAIError
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionMessageParam,
    ChatCompletionUserMessageParam,
)

from local_server import PLAIN, LocalServer, ServerError
from sglang_sm120_reference.packed import unpack

REACH = 2048
"""Tokens behind the question up to which attention takes all compressed entries; beyond, the indexer chooses."""

# Words in the roles in which the model learned them.
RECORDS = {
    "small": "water", "through": "sound", "first": "people", "good": "help", "great": "number", "line": "place",
    "name": "work", "part": "word", "day": "time", "year": "boy",
}  # fmt: skip
FILLER = "she want right think like get did his much than does oil too came come follow way each their most".split()
ASKED = ("small", "year")
TELL_SECONDS = 5
PHASES = (
    ("server_args=", "starting the scheduler, which imports SGLang again"),
    ("Load weight begin", "loading the model"),
    ("DSV4 pool sizes", "taking memory for the cache"),
    ("Uvicorn running", "warming up: the first request"),
)
"""What SGLang's log has when it is at each."""
NEXT = """
What to try next:
  make small-model DIR=../small-model
  .venv/bin/python -m sglang.launch_server --model-path ../small-model --device cpu
                        the same server, for your own requests to http://127.0.0.1:30000/v1
  make accuracy-cpu     the same model asked 64 questions with known answers
  .venv/bin/sglang-sm120 doctor
                        what this machine lacks for DeepSeek-V4-Flash; README.md has the way for two cards"""


def _say(text: str) -> None:
    print(text, flush=True)


def haystack(words: int = 2400) -> str:
    """Words without meaning with `RECORDS` among them, the first of them at the beginning."""
    rng = random.Random(0)
    text = rng.choices(FILLER, k=words)
    places = [8, *sorted(rng.sample(range(40, words, 8), len(RECORDS) - 1))]
    for place, (key, value) in zip(places, RECORDS.items(), strict=True):
        text[place] = f"{key} is {value}."
    return "".join(f" {word}" for word in text)


@contextmanager
def _telling(log: Path) -> Iterator[None]:
    """Inside, a line every few seconds: how long it has taken, and what the server's log says that it is at."""
    began, over = time.monotonic(), threading.Event()

    def tell() -> None:
        while not over.wait(TELL_SECONDS):
            text = log.read_text(errors="replace") if log.exists() else ""
            reached = [phase for mark, phase in PHASES if mark in text]
            _say(f"  {time.monotonic() - began:3.0f} s  {reached[-1] if reached else 'importing SGLang'}")

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        over.set()
        teller.join()


def _answer(client: OpenAI, model: str, messages: list[ChatCompletionMessageParam]) -> tuple[str, int]:
    """(the greedy answer, tokens of the prompt), streamed as it comes; it must be the same in one piece."""
    start, pieces = time.monotonic(), []
    print("streamed:", end="", flush=True)
    for chunk in client.chat.completions.create(
        model=model, messages=messages, max_tokens=8, temperature=0, stream=True
    ):
        if chunk.choices:
            pieces.append(chunk.choices[0].delta.content or "")
            print(pieces[-1], end="", flush=True)
    _say(f"   ({len(pieces)} chunks, {time.monotonic() - start:.1f} s)")
    start = time.monotonic()
    chat = client.chat.completions.create(model=model, messages=messages, max_tokens=8, temperature=0)
    assert chat.usage is not None
    answer = chat.choices[0].message.content or ""
    _say(f"chat completion ({chat.usage.prompt_tokens} + {chat.usage.completion_tokens} tokens, "
         f"{time.monotonic() - start:.1f} s): {answer!r}")  # fmt: skip
    if "".join(pieces) != answer:
        raise ServerError("The streamed completion differs from the plain one, though both were greedy.")
    return answer, chat.usage.prompt_tokens


def _constrained(client: OpenAI, model: str, word: str) -> None:
    """A JSON object by a schema, and the right one."""
    values = {"type": "string", "enum": [f" {key}" for key in RECORDS]}
    schema: dict[str, object] = {"type": "object", "properties": {"word": values}, "required": ["word"]}
    chat = client.chat.completions.create(
        model=model,
        messages=[ChatCompletionUserMessageParam(role="user", content=f"json {word}")],
        max_tokens=32,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "words", "schema": schema}},
    )
    answer = chat.choices[0].message.content or ""
    _say(f"by a JSON schema: {answer!r}")
    if json.loads(answer) != {"word": f" {word}"}:
        raise ServerError(f"The answer by a JSON schema is {answer!r}, right is the word ' {word}'.")


def _show_requests(url: str) -> None:
    for path in ("/health", "/v1/models"):
        response = httpx.get(url + path, timeout=60)
        response.raise_for_status()
        _say(f"GET {path}: {response.status_code} {response.text.strip()[:120]}")

    sent: list[str] = []
    counting = DefaultHttpxClient(event_hooks={"request": [lambda request: sent.append(request.url.path)]})
    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0, http_client=counting)
    model = client.models.list().data[0].id
    messages: list[ChatCompletionMessageParam] = []
    text = haystack()
    _say(f"{len(text.split())} words: …{text[-60:]}")
    start = time.monotonic()
    for key in ASKED:
        _say(f"What is {key!r}? The text says {RECORDS[key]!r}.")
        messages.append(ChatCompletionUserMessageParam(role="user", content=f"{text} {key}?"))
        answer, tokens = _answer(client, model, messages)
        if tokens <= REACH:
            raise ServerError(f"The prompt has {tokens} tokens, needed more than {REACH}.")
        if answer.split() != [key, RECORDS[key]]:
            raise ServerError(f"The answer is {answer!r}, right is ' {key} {RECORDS[key]}'.")
        messages.append(ChatCompletionAssistantMessageParam(role="assistant", content=answer))
        text = ""
    _constrained(client, model, ASKED[0])
    seconds, requests = time.monotonic() - start, sum(path.endswith("/completions") for path in sent)
    _say(f"{requests} requests in {seconds:.1f} s: {60 * requests / seconds:.1f} requests a minute")


def main(argv: list[str] | None = None) -> int:
    """Run the demo; 0 when every request was answered, and rightly, 1 with one sentence otherwise."""
    parser = argparse.ArgumentParser(prog="evals/demo.py", description="A small DeepSeek-V4 on CPU.")
    parser.add_argument("packed", type=Path, metavar="PACKED", help="a trained checkpoint in one file")
    packed: Path = parser.parse_args(argv).packed
    # An exception, unlike the signal itself, stops the server on its way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="sglang-sm120-demo-") as scratch:
        checkpoint = Path(scratch) / "DeepSeek-V4-small"
        log = Path(scratch) / "server.log"
        try:
            _say(f"Unpacking the small trained DeepSeek-V4 of {packed} …")
            unpack(packed, checkpoint)
            _say("Starting python -m sglang.launch_server --device cpu … (about a minute)")
            start = time.monotonic()
            server = LocalServer(checkpoint, "--device", "cpu", log=log)
            with ExitStack() as stack:
                with _telling(log):
                    stack.enter_context(server)
                _say(f"Server ready at {server.url} after {time.monotonic() - start:.0f} s.")
                _show_requests(server.url)
                server.require_step(PLAIN)
        except (ServerError, OSError, ValueError, httpx.HTTPError, OpenAIError) as error:
            print(f"make demo failed: {error}", file=sys.stderr)
            return 1
    _say("Server stopped. The demo worked.")
    _say(NEXT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
