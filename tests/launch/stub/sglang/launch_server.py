"""An HTTP process that answers by itself, and a scheduler process that makes the tokens.

`STUB` names a misbehaviour: `exits` before it is ready, `never-ready`, `no-answer` to the first request.
"""

from __future__ import annotations

import http.server
import json
import os
import select
import subprocess
import sys
import time

SCHEDULER = "import sys\nfor line in sys.stdin:\n    print('token', flush=True)\n"
MANNER = os.environ.get("STUB")
# SGLang names its processes so.
scheduler = subprocess.Popen(
    ["sglang::scheduler", "-c", SCHEDULER], executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE
)
tokens = 0


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
        made = MANNER != "no-answer" and token(2)
        self.answer(200 if made else 500, json.dumps({"meta_info": {"prompt_tokens": 5, "completion_tokens": 16}}))

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


port = int(sys.argv[sys.argv.index("--port") + 1])
if MANNER == "exits":
    time.sleep(0.5)
    sys.exit(7)
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
