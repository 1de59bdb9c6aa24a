"""Numbers that the overlay and the launcher share; no torch here."""

from __future__ import annotations

from typing import Any

__all__ = ["CPU_SERVER", "MAX_ROWS"]

MAX_ROWS = 256
"""Rows of the largest pass that the step takes on a GPU, verification included; larger ones are SGLang's."""
CPU_SERVER: dict[str, Any] = {
    "max_total_tokens": 32768,
    "max_running_requests": 8,
    "swa_full_tokens_ratio": 0.4,
    "sleep_on_idle": True,
}
"""SGLang's settings on a CPU where the user gave none: a laptop's worth of cache (SGLang would size it by all free
memory), and a core that is free while no request is there."""
