"""Which passes the step serves and which SGLang's forward: in the log when it is the first of its kind, and counted.

With `--enable-metrics` rank 0 counts in `/metrics` too. The replay of a CUDA graph is a pass that SGLang plans no more:
it counts those itself (`sglang:cuda_graph_passes_total`), and here is counted whose forward the graphs hold.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from functools import cache
from typing import Any

import torch

from ..limits import GRAPHS, PASSES

logger = logging.getLogger(__name__)


class Passes:
    """The planned passes of one model: by mode those of the step, by reason those of SGLang's forward.

    Args:
        counts: whether this rank's passes are counted in the server's metrics.
    """

    def __init__(self, counts: bool = False) -> None:
        self.taken: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self._counts = counts and "PROMETHEUS_MULTIPROC_DIR" in os.environ

    def take(self, mode: str, rows: int) -> None:
        """The step serves a pass of this mode."""
        if not self.taken[mode]:
            logger.info("sglang_sm120: the step takes its first %s pass (%d rows).", mode, rows)
        self.taken[mode] += 1
        self._count("step", mode, "")

    def leave(self, mode: str, why: str) -> None:
        """SGLang's forward serves one, for this reason."""
        if not self.left[why]:
            logger.info("sglang_sm120: SGLang's forward serves a pass, because %s.", why)
        self.left[why] += 1
        self._count("sglang", mode, why)

    def _count(self, by: str, mode: str, why: str) -> None:
        if not self._counts:
            return
        from sglang.srt.model_executor.runner_utils.capture_mode import get_is_capture_mode

        passes, graphs = _counters()
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            graphs.labels(by=by, mode=mode).inc()
        elif not get_is_capture_mode():  # else it only comes before the capture of a graph
            passes.labels(by=by, mode=mode, why=why).inc()


@cache
def _counters() -> tuple[Any, Any]:
    # Its first import settles where processes share their counts: SGLang has set that by now.
    from prometheus_client import Counter as Metric

    return (
        Metric(f"{PASSES}_total", "Passes outside of CUDA graphs, by whose forward.", ["by", "mode", "why"]),
        Metric(f"{GRAPHS}_total", "CUDA graphs captured, by whose forward.", ["by", "mode"]),
    )
