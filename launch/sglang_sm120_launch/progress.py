"""Whether a running server makes tokens: `python -m sglang_sm120_launch.progress URL` exits 0 when it does.

SGLang's scheduler counts every token it computes (`sglang:realtime_tokens_total`, with `--enable-metrics`). While no
request is there the counter rests, so a resting server is asked for one token through `/health_generate`, which answers
200 only when scheduler and detokenizer have. An open port, or a page that the HTTP process answers alone, says nothing.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from pathlib import Path

import httpx

from .address import URL_FILE

COUNTER = "sglang:realtime_tokens_total"
PAGE_SECONDS = 5.0
"""How long the HTTP process may take for its metrics page; a later page counts as none."""
ASK_SECONDS = 30.0
"""How long one question for a token stays open; SGLang itself gives up after 20 s, and it is asked again."""
LOOK_SECONDS = 1.0


class Progress:
    """Watches the tokens of the server at `url`, from now on."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # The server is this machine's own, and its certificate names it as clients do, not as it is reached here.
        self._client = httpx.Client(base_url=url, headers=headers, trust_env=False, verify=False)
        self._tokens = self.tokens()
        self._seen = time.monotonic()
        self._question: threading.Thread | None = None

    def tokens(self) -> float | None:
        """Tokens computed since the server started; None when it does not say."""
        try:
            page = self._client.get("/metrics", timeout=PAGE_SECONDS).text
        except httpx.HTTPError:
            return None
        counts = [float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if line.startswith(COUNTER)]
        return sum(counts) if counts else None

    def silence(self) -> float:
        """Seconds since the server was last seen to make a token; asks it for one when its counter rests."""
        tokens = self.tokens()
        if tokens is not None and tokens != self._tokens:
            self._tokens, self._seen = tokens, time.monotonic()
        elif self._question is None or not self._question.is_alive():
            self._question = threading.Thread(target=self._ask, daemon=True)
            self._question.start()
        return time.monotonic() - self._seen

    def made_within(self, seconds: float) -> bool:
        """Whether the server makes a token within the next `seconds`."""
        began = time.monotonic()
        while time.monotonic() - began < seconds:
            self.silence()
            if self._seen > began:
                return True
            time.sleep(LOOK_SECONDS)
        return False

    def _ask(self) -> None:
        try:
            if self._client.get("/health_generate", timeout=ASK_SECONDS).status_code == 200:
                self._seen = time.monotonic()
        except httpx.HTTPError:
            pass


def main(words: list[str]) -> int:
    """0 when the server makes a token within 30 seconds, 1 when not, 2 for misuse.

    Without a URL it is the one that `serve` has written into the file that SGLANG_SM120_URL_FILE names.
    """
    file = os.environ.get(URL_FILE)
    if len(words) > 1 or not (words or file):
        print(f"usage: python -m sglang_sm120_launch.progress URL, or set {URL_FILE}", file=sys.stderr)
        return 2
    try:
        url = words[0] if words else Path(str(file)).read_text(encoding="utf-8").strip()
    except OSError:
        return 1
    return 0 if Progress(url).made_within(ASK_SECONDS) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
