"""A few lines of http.server that know every right answer of the harness, and whose faults a test sets."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import instructions
import tools

Calls = list[tuple[str, dict[str, Any]]]


class Fake:
    """A server with right answers to everything, whose faults a test sets.

    Attributes:
        context: what it says is its longest sequence.
        reach: how many words before the end it still sees; None for all.
        text: what becomes of a text reply.
        calls: what becomes of the calls of a case, given its name.
        finish: the finish reason beside tool calls.
        tokenizes: whether it has /tokenize.
        answers: right answers of synthetic prompts and of GSM8K, by prompt.
        refuses: whether completions are refused with HTTP 400.
        gate: chat requests wait until as many were in flight at a time.
        widest: the most chat requests that were in flight at a time.
    """

    def __init__(self) -> None:
        self.context = 1 << 20
        self.reach: int | None = None
        self.text: Callable[[str], str] = lambda text: text
        self.calls: Callable[[str, Calls], Calls] = lambda name, calls: calls
        self.finish = "tool_calls"
        self.tokenizes = True
        self.answers: dict[str, str] = {}
        self.refuses = False
        self.gate = 0
        self.widest = 0
        self._flying = 0
        self._changed = threading.Condition()
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                card = {"id": "fake", "object": "model", "max_model_len": fake.context}
                self.send({"data": [card]} if self.path == "/v1/models" else {}, 200 if "models" in self.path else 404)

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self.path == "/tokenize" and fake.tokenizes:
                    self.send({"count": tokens(body["messages"])})
                elif self.path == "/v1/chat/completions":
                    with fake.flight():
                        self.chat(body)
                elif self.path == "/v1/completions" and not fake.refuses:
                    answer = next((a for q, a in fake.answers.items() if body["prompt"].endswith(q)), "")
                    self.send({"choices": [{"index": 0, "text": fake.text(answer), "finish_reason": "stop"}]})
                else:
                    self.send({"error": {"message": "refused"}}, 400)

            def chat(self, body: dict[str, Any]) -> None:
                text, calls = fake.reply(body)
                shown = [
                    {"index": i, "id": f"call_{i}", "type": "function",
                     "function": {"name": name, "arguments": json.dumps(arguments)}}
                    for i, (name, arguments) in enumerate(calls)
                ]  # fmt: skip
                finish = fake.finish if calls else "stop"
                if body.get("stream"):
                    return self.stream(shown, text, finish)
                message = {"role": "assistant", "content": text, "tool_calls": shown or None}
                usage = {"prompt_tokens": tokens(body["messages"]), "completion_tokens": 1, "total_tokens": 1}
                self.send({"choices": [{"index": 0, "message": message, "finish_reason": finish}], "usage": usage})

            def stream(self, calls: list[dict[str, Any]], text: str, finish: str) -> None:
                """Calls in pieces: the name first, then every character of the arguments by itself."""
                deltas: list[dict[str, Any]] = [{"role": "assistant", "content": text}]
                for call in calls:
                    arguments = call["function"]["arguments"]
                    deltas.append({"tool_calls": [{**call, "function": {**call["function"], "arguments": ""}}]})
                    deltas += [{"tool_calls": [{"index": call["index"], "function": {"arguments": c}}]}
                               for c in arguments]  # fmt: skip
                events = [{"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
                events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
                data = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
                self.send_bytes(data.encode(), "text/event-stream")

            def send(self, value: Any, status: int = 200) -> None:
                self.send_bytes(json.dumps(value).encode(), "application/json", status)

            def send_bytes(self, data: bytes, kind: str, status: int = 200) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def flight(self) -> Any:
        """Counts the requests that are in flight."""
        fake = self

        class Flight:
            def __enter__(self) -> None:
                with fake._changed:
                    fake._flying += 1
                    fake.widest = max(fake.widest, fake._flying)
                    fake._changed.notify_all()
                    fake._changed.wait_for(lambda: fake.widest >= fake.gate, timeout=20)

            def __exit__(self, *_: Any) -> None:
                with fake._changed:
                    fake._flying -= 1

        return Flight()

    def reply(self, body: dict[str, Any]) -> tuple[str, Calls]:
        """Text and calls that are right, but for the faults."""
        asked = next(m["content"] for m in body["messages"] if m["role"] == "user")
        if "tools" in body:
            case = next(c for c in tools.CASES if c.messages == body["messages"])
            return case.says, self.calls(case.name, list(case.calls))
        if place := re.search(r"What is the pass key of (\w+)\?", asked):
            seen = " ".join(asked.split()[-self.reach :]) if self.reach else asked
            key = re.search(rf"The pass key of {place[1]} is (\d+)\.", seen)
            return self.text(f"The pass key is {key[1]}." if key else "It is not in the text; perhaps 1234567."), []
        for question in instructions.CASES:
            if asked.startswith(question.request):
                return self.text(json.dumps(question.expected, ensure_ascii=False)), []
        return self.text(next((a for q, a in self.answers.items() if asked.endswith(q)), "")), []

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def tokens(messages: list[dict[str, Any]]) -> int:
    """The fake server's tokenizer: words, and three for a template."""
    return 3 + sum(len(m["content"].split()) for m in messages)
