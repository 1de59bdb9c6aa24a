"""One OpenAI-compatible server: what it is, how many tokens it makes of a text, and its replies as plain values."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple, TypeVar

import httpx
import openai
from tqdm import tqdm

T = TypeVar("T")
Messages = Sequence[dict[str, Any]]
TIMEOUT_S = 3600
"""For one reply: a prompt of 1M tokens that waits behind fifteen others takes many minutes."""
SETTINGS = (
    "version", "device", "tp_size", "pp_size", "dp_size", "context_length", "chunked_prefill_size",
    "max_running_requests", "max_total_num_tokens", "max_req_input_len", "disable_cuda_graph", "disable_radix_cache",
    "moe_runner_backend", "attention_backend", "kv_cache_dtype", "reasoning_parser", "tool_call_parser",
    "speculative_algorithm", "speculative_num_steps", "speculative_num_draft_tokens",
)  # fmt: skip
"""What is kept of SGLang's /server_info: settings that can change a score."""


class Misuse(Exception):
    """The caller gave or has something wrong. The message is one sentence; the exit code is 2."""


class ServerGone(Exception):
    """The server stopped answering. The message is one sentence; the exit code is 1."""


class Call(NamedTuple):
    """A tool call; `arguments` is the JSON text as the server sent it."""

    name: str
    arguments: str
    id: str


class Reply(NamedTuple):
    """What a request came to. `error` is the server's refusal; then there is no text and there are no calls."""

    text: str = ""
    calls: tuple[Call, ...] = ()
    finish: str | None = None
    prompt_tokens: int | None = None
    error: str | None = None


class Client:
    """The server at `url`, with or without a trailing /v1.

    The API key is read from OPENAI_API_KEY, as SGLang's own test tools do.

    Attributes:
        model: the first model it lists.
        context: longest sequence, prompt and answer together, in tokens; None when the server does not say.
        longest_prompt: longest prompt its KV pool takes, in tokens; None when the server does not say.
        settings: what is kept of /server_info, empty when it is not SGLang.

    Raises:
        Misuse: no OpenAI-compatible server answers at `url`.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1").rstrip("/")
        key = os.environ.get("OPENAI_API_KEY") or "EMPTY"
        # One for all: each new one reads the system's certificates first.
        self._http = httpx.Client(
            headers={"Authorization": f"Bearer {key}"}, timeout=TIMEOUT_S, limits=httpx.Limits(max_connections=None)
        )
        try:
            answer = self._http.get(f"{self.url}/v1/models", timeout=30)
            answer.raise_for_status()
            card = answer.json()["data"][0]
            self.model = str(card["id"])
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError) as error:
            raise Misuse(
                f"No OpenAI-compatible server answers at {self.url}/v1/models ({error or type(error).__name__}): start "
                "one, or name its base URL."
            ) from None
        server = self._server_info()
        self.settings = {name: server[name] for name in SETTINGS if name in server}
        self.context: int | None = card.get("max_model_len")
        # SGLang refuses a prompt of max_req_input_len tokens.
        taken = server.get("max_req_input_len")
        self.longest_prompt = None if taken is None else int(taken) - 1
        self._openai = openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, timeout=TIMEOUT_S, max_retries=0, http_client=self._http
        )
        self.tokenizes = self._tokenize([{"role": "user", "content": "x"}]) is not None

    def _server_info(self) -> dict[str, Any]:
        try:
            answer = self._http.get(f"{self.url}/server_info", timeout=30)
            server = answer.json() if answer.status_code == 200 else {}
        except (httpx.HTTPError, ValueError):
            return {}
        return server if isinstance(server, dict) else {}

    def accept_length(self) -> float | None:
        """SGLang's mean number of tokens per verified step, None without speculative decoding."""
        states = self._server_info().get("internal_states") or [{}]
        return states[0].get("avg_spec_accept_length")

    def _tokenize(self, messages: Messages) -> int | None:
        body = {"model": self.model, "messages": list(messages)}
        try:
            answer = self._http.post(f"{self.url}/tokenize", json=body, timeout=300)
            return int(answer.json()["count"]) if answer.status_code == 200 else None
        except (httpx.HTTPError, ValueError, LookupError, TypeError):
            return None

    def count(self, messages: Messages) -> int:
        """Tokens of a prompt as the server counts them, its chat template included.

        From /tokenize, or else from the usage of a reply of one token.

        Raises:
            Misuse: the server says neither.
        """
        found = self._tokenize(messages) if self.tokenizes else self.chat(messages, 1).prompt_tokens
        if found is None:
            raise Misuse(
                f"{self.url} counts no tokens, neither at /tokenize nor as `usage`, needed for prompts of a length: "
                "leave the suite needle out with --only."
            )
        return found

    def chat(self, messages: Messages, max_tokens: int, *, stream: bool = False, **more: Any) -> Reply:
        """A greedy chat completion; a refusal is a Reply with `error`.

        Raises:
            ServerGone: nothing listens any more.
        """
        return self._guarded(lambda: self._chat(messages, max_tokens, stream, more))

    def _chat(self, messages: Messages, max_tokens: int, stream: bool, more: dict[str, Any]) -> Reply:
        create: Callable[..., Any] = self._openai.chat.completions.create
        body = {"model": self.model, "messages": list(messages), "max_tokens": max_tokens, "temperature": 0, **more}
        if stream:
            return _joined(create(**body, stream=True))
        answer = create(**body)
        choice = answer.choices[0]
        calls = tuple(Call(c.function.name, c.function.arguments, c.id) for c in choice.message.tool_calls or ())
        return Reply(choice.message.content or "", calls, choice.finish_reason, _prompt_tokens(answer))

    def complete(self, prompt: str | Sequence[int], max_tokens: int, stop: Sequence[str] | None = None) -> Reply:
        """A greedy completion of a text or of token ids; a refusal is a Reply with `error`.

        Raises:
            ServerGone: nothing listens any more.
        """

        def send() -> Reply:
            create: Callable[..., Any] = self._openai.completions.create
            more = {"stop": list(stop)} if stop else {}
            answer = create(model=self.model, prompt=prompt, max_tokens=max_tokens, temperature=0, **more)
            choice = answer.choices[0]
            return Reply(choice.text or "", (), choice.finish_reason, _prompt_tokens(answer))

        return self._guarded(send)

    def _guarded(self, send: Callable[[], Reply]) -> Reply:
        try:
            return send()
        except openai.APITimeoutError:
            return Reply(error=f"no reply within {TIMEOUT_S} s")
        except openai.APIConnectionError as error:
            raise ServerGone(f"The server at {self.url} stopped answering ({error}): look at its log.") from None
        except openai.APIStatusError as error:
            return Reply(error=f"HTTP {error.status_code}: {error.message[:300]}")
        except httpx.HTTPError as error:
            # openai wraps connection errors of the request, not those of reading a stream.
            raise ServerGone(f"The server at {self.url} broke a reply off ({error}): look at its log.") from None
        except (openai.OpenAIError, LookupError, TypeError, AttributeError, json.JSONDecodeError) as error:
            return Reply(error=f"not a reply as OpenAI's API has it ({type(error).__name__}: {error})"[:300])


def _prompt_tokens(answer: Any) -> int | None:
    return None if answer.usage is None else answer.usage.prompt_tokens


def _joined(chunks: Any) -> Reply:
    """A streamed reply put together; pieces of a call belong together by their index."""
    text, finish = "", None
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        if not chunk.choices:
            continue
        choice = chunk.choices[0]
        text += choice.delta.content or ""
        finish = choice.finish_reason or finish
        for piece in choice.delta.tool_calls or ():
            call = calls.setdefault(piece.index, ["", "", ""])
            function = piece.function
            call[0] += (function and function.name) or ""
            call[1] += (function and function.arguments) or ""
            call[2] = call[2] or piece.id or ""
    return Reply(text, tuple(Call(*calls[index]) for index in sorted(calls)), finish)


def ask_all(ask: Callable[[T], Reply], questions: Sequence[T], concurrency: int, what: str) -> list[Reply]:
    """Replies in the order of the questions, `concurrency` of them in flight, with a progress bar named `what`.

    Raises:
        ServerGone: nothing listens any more; questions not sent yet are dropped.
    """
    with (
        tqdm(total=len(questions), desc=what, unit="req", dynamic_ncols=True) as bar,
        ThreadPoolExecutor(concurrency) as pool,
    ):
        futures = [pool.submit(ask, question) for question in questions]
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]
