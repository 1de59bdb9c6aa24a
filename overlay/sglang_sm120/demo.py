"""`make demo`: a small DeepSeek-V4 checkpoint, the real SGLang server on CPU, and a few requests as a user sends them.

The checkpoint has random weights, so the text it writes means nothing; what is shown is that the whole path works.
"""

from __future__ import annotations

import signal
import sys
import tempfile
import time
from pathlib import Path

import httpx
from openai import OpenAI, OpenAIError
from openai.types.chat import ChatCompletionUserMessageParam

from sglang_sm120.local_server import LocalServer, ServerError
from sglang_sm120.reference.write import write_checkpoint

LONG_PROMPT_TOKENS = 2500


def _say(text: str) -> None:
    print(text, flush=True)


def _show_requests(url: str) -> None:
    for path in ("/health", "/v1/models"):
        response = httpx.get(url + path, timeout=60)
        response.raise_for_status()
        _say(f"GET {path}: {response.status_code} {response.text.strip()[:120]}")

    client = OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300, max_retries=0)
    model = client.models.list().data[0].id
    question = [ChatCompletionUserMessageParam(role="user", content="What is 6 times 7?")]

    start = time.monotonic()
    chat = client.chat.completions.create(model=model, messages=question, max_tokens=16, temperature=0)
    assert chat.usage is not None
    _say(f"chat completion ({chat.usage.prompt_tokens} + {chat.usage.completion_tokens} tokens, "
         f"{time.monotonic() - start:.1f} s): {chat.choices[0].message.content!r}")  # fmt: skip

    pieces = [
        chunk.choices[0].delta.content or ""
        for chunk in client.chat.completions.create(
            model=model, messages=question, max_tokens=16, temperature=0, stream=True
        )
        if chunk.choices
    ]
    _say(f"streamed completion ({len(pieces)} chunks): {''.join(pieces)!r}")
    if "".join(pieces) != (chat.choices[0].message.content or ""):
        raise ServerError("The streamed completion differs from the plain one, though both were greedy.")

    text = " ".join(f"Line {i}: the key of box {i} is {i * 7919 % 10007}." for i in range(1, 101))
    start = time.monotonic()
    long = client.completions.create(model=model, prompt=text, max_tokens=4, temperature=0)
    assert long.usage is not None
    if long.usage.prompt_tokens <= LONG_PROMPT_TOKENS:
        raise ServerError(f"The long prompt has {long.usage.prompt_tokens} tokens, not over {LONG_PROMPT_TOKENS}.")
    _say(f"long prompt ({long.usage.prompt_tokens} tokens, {time.monotonic() - start:.1f} s): {long.choices[0].text!r}")


def main() -> int:
    """Run the demo; 0 when every request was answered, 1 with one sentence otherwise."""
    # An exception, unlike the signal itself, stops the server on its way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with tempfile.TemporaryDirectory(prefix="sglang-sm120-demo-") as scratch:
        checkpoint = Path(scratch) / "DeepSeek-V4-small"
        _say("Writing a small DeepSeek-V4 checkpoint with random weights …")
        write_checkpoint(checkpoint)
        log = Path(scratch) / "server.log"
        _say("Starting python -m sglang.launch_server --device cpu … (about a minute)")
        start = time.monotonic()
        try:
            with LocalServer(checkpoint, "--device", "cpu", log=log) as server:
                _say(f"Server ready at {server.url} after {time.monotonic() - start:.0f} s.")
                _show_requests(server.url)
        except (ServerError, httpx.HTTPError, OpenAIError) as error:
            print(f"make demo failed: {error}", file=sys.stderr)
            return 1
    _say("Server stopped. The demo worked.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
