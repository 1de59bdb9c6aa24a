"""One streamed answer of the chat endpoint, and whether it is whole.

SGLang's own benchmark counts an answer as good whatever its stream holds, and as many tokens as were asked for where
none are reported: an error event, a stream that ends early and one that lost its text would all flatter.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stream:
    """Takes the lines of an answer as they come.

    Attributes:
        asked: tokens that the request asks for, end-of-sequence ignored.
        texts: the text of each event that has some; `times` are their seconds on the clock of `time.perf_counter`.
        said: tokens of the answer and of the prompt by the server's own count, where it has given them.
    """

    asked: int
    texts: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    said: int | None = None
    prompt: int | None = None
    finished: bool = False
    done: bool = False
    failure: str = ""

    def take(self, line: bytes) -> None:
        """One line of the stream, its end included; what is wrong with it is kept in `failure`."""
        text = line.decode("utf-8", "replace").strip()
        if not text.startswith("data:"):
            if text and not text.startswith(":"):
                self._fail(f"the stream has the line {text[:80]!r}")
            return
        text = text.removeprefix("data:").strip()
        if text == "[DONE]":
            self.done = True
            return
        try:
            self._event(json.loads(text))
        except (ValueError, TypeError, AttributeError, KeyError, IndexError):
            self._fail(f"the stream has the event {text[:80]!r}")

    def tokens(self) -> int:
        """Tokens of the answer: as the server counts them, else one for each event with text."""
        return len(self.texts) if self.said is None else self.said

    def problem(self) -> str:
        """Why the answer is none, empty where it is whole."""
        if self.failure:
            return self.failure
        if not (self.finished and self.done):
            return f"the stream ended early, after {self.tokens()} of {self.asked} tokens"
        # Special tokens are asked for as text, so that each token has a byte at least.
        size = sum(len(text.encode()) for text in self.texts)
        if self.tokens() > size:
            return f"the stream says {self.tokens()} tokens and holds {size} bytes of text"
        if self.said is not None and self.said < self.asked:
            return f"the answer has {self.said} of {self.asked} tokens"
        return ""

    def _event(self, event: dict[str, Any]) -> None:
        if error := event.get("error"):
            self._fail(f"the stream has an error: {error.get('message', error) if isinstance(error, dict) else error}")
            return
        if usage := event.get("usage"):
            self.said, self.prompt = int(usage["completion_tokens"]), usage.get("prompt_tokens")
        for choice in event.get("choices") or ():
            delta = choice.get("delta") or {}
            text = (delta.get("reasoning_content") or "") + (delta.get("content") or "")
            if text:
                self.texts.append(text)
                self.times.append(time.perf_counter())
            reason = choice.get("finish_reason")
            if reason in ("abort", "error"):
                self._fail(f"the answer was ended by {reason}")
            self.finished |= reason is not None

    def _fail(self, why: str) -> None:
        self.failure = self.failure or why


async def ask(request_func_input: Any, pbar: Any = None) -> Any:
    """A request function as SGLang's benchmark calls it: its RequestFuncInput to its RequestFuncOutput."""
    import aiohttp
    from sglang.benchmark import serving

    call = request_func_input
    output = serving.RequestFuncOutput.init_new(call)
    stream = Stream(call.output_len)
    body = {
        "model": call.model,
        "messages": [{"role": "user", "content": call.prompt}],
        "max_completion_tokens": call.output_len,
        "stream": True,
        "temperature": 0.0,
        "ignore_eos": True,
        "skip_special_tokens": False,
        **call.extra_request_body,
    }
    output.start_time = began = time.perf_counter()
    try:
        async with (
            serving._create_bench_client_session() as session,
            session.post(call.api_url, json=body, headers=serving.get_request_headers()) as response,
        ):
            if response.status == 200:
                async for line in response.content:
                    stream.take(line)
                output.error = stream.problem()
            else:
                output.error = f"{response.status} {response.reason}: {await response.text()}"
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
        output.error = f"{type(error).__name__}: {error}"
    output.latency = time.perf_counter() - began
    output.success = not output.error
    output.output_len = stream.tokens()
    output.prompt_len = stream.prompt or output.prompt_len
    output.generated_text, output.text_chunks = "".join(stream.texts), stream.texts[1:]
    if stream.times:
        output.ttft = stream.times[0] - began
        output.itl = [late - early for early, late in zip(stream.times, stream.times[1:], strict=False)]
    if pbar is not None:
        pbar.update(1)
    return output
