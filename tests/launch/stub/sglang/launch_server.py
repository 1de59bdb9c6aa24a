"""An HTTP process that answers by itself, and a scheduler process that makes the tokens.

`STUB` names a misbehaviour: `exits` before it is ready, `never-ready`, `no-answer` to the first request. Like SGLang's,
the first process answers what is in flight before it ends by SIGTERM, which ends the scheduler at once.
"""

from __future__ import annotations

import http.server
import json
import os
import select
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from types import FrameType

SCHEDULER = "import sys\nfor line in sys.stdin:\n    print('token', flush=True)\n"
MANNER = os.environ.get("STUB")
# SGLang names its processes so.
scheduler = subprocess.Popen(
    ["sglang::scheduler", "-c", SCHEDULER], executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE
)
tokens = 0
flying = 0


def token(seconds: float) -> bool:
    """Ask the scheduler for one."""
    global tokens
    assert scheduler.stdin is not None and scheduler.stdout is not None
    try:
        scheduler.stdin.write(b"?\n")
        scheduler.stdin.flush()
    except BrokenPipeError:
        return False
    if not select.select([scheduler.stdout], [], [], seconds)[0] or not scheduler.stdout.readline():
        return False
    tokens += 1
    return True


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/metrics":
            self.answer(200, f'sglang:realtime_tokens_total{{mode="decode"}} {tokens}.0\n')
        elif self.path == "/health":
            self.answer(503 if MANNER == "never-ready" else 200, "")
        else:
            self.answer(200 if token(2) else 503, "")

    def do_POST(self) -> None:
        global flying
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if ("input_ids" in body) != ("--skip-tokenizer-init" in sys.argv):
            self.answer(400, "")
            return
        flying += 1
        time.sleep(body.get("seconds", 0))
        made = MANNER != "no-answer" and token(2)
        self.answer(200 if made else 500, json.dumps({"meta_info": {"prompt_tokens": 5, "completion_tokens": 16}}))
        flying -= 1

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


def drain(number: int, frame: FrameType | None) -> None:
    """SIGTERM: wait for what is in flight, then end."""
    threading.Thread(target=wait).start()


def wait() -> None:
    while flying:
        time.sleep(0.1)
    scheduler.kill()
    os._exit(0)


def given(name: str, default: str) -> str:
    return sys.argv[sys.argv.index(name) + 1] if name in sys.argv else default


signal.signal(signal.SIGTERM, drain)
port, host = int(given("--port", "")), given("--host", "127.0.0.1")
if MANNER == "exits":
    time.sleep(0.5)
    sys.exit(7)
http.server.ThreadingHTTPServer.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
server = http.server.ThreadingHTTPServer((host, port), Handler)
if certificate := given("--ssl-certfile", ""):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, given("--ssl-keyfile", ""))
    server.socket = context.wrap_socket(server.socket, server_side=True)
server.serve_forever()
