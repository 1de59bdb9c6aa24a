"""Which passes the step serves and which SGLang's forward, counted and said."""

from __future__ import annotations

import logging
from collections import Counter

logger = logging.getLogger(__name__)


class Passes:
    """How many passes of each mode were planned for the step, and how many for SGLang's forward, by reason.

    The replay of a CUDA graph is not planned again.
    """

    def __init__(self) -> None:
        self.taken: Counter[str] = Counter()
        self.left: Counter[str] = Counter()

    def take(self, mode: str, rows: int) -> None:
        if not self.taken[mode]:
            logger.info("sglang_sm120: the step takes its first %s pass (%d rows).", mode, rows)
        self.taken[mode] += 1

    def leave(self, why: str) -> None:
        if not self.left[why]:
            logger.info("sglang_sm120: SGLang's forward serves a pass, because %s.", why)
        self.left[why] += 1
