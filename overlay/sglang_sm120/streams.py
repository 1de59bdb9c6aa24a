"""Parts of a layer that need nothing of each other run beside each other, on SGLang's alternate streams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch

__all__ = ["ALTERNATES", "ENTRIES", "INDEX_KEYS", "INDEX_QUERIES", "IN_ORDER", "KEYS", "SHARED", "Beside", "Mark"]

KEYS, ENTRIES, INDEX_KEYS, INDEX_QUERIES = range(4)
"""What runs beside the queries of a layer's attention, by its stream's number."""
SHARED = KEYS
"""The shared expert's stream, beside the routed ones'."""
ALTERNATES = {"bf16_linear_fp32": 2, "fp8_linear": 2}
"""Ops with scratch that run on the step's own stream and on others, and on how many others."""
Mark: TypeAlias = torch.cuda.Event | None
"""A point of a stream that another one can wait for; None where there is one stream alone."""


class Beside:
    """Runs parts on `streams`; without any, where they stand, one after the other.

    What a part makes may be used after `join`, or by a part that waits for its `mark`. A part's memory needs no
    `record_stream`: it is used only between the marks that its stream waits for and the join.
    """

    def __init__(self, streams: Sequence[torch.cuda.Stream] = ()) -> None:
        self._streams = streams
        self._running: list[torch.cuda.Stream] = []

    def mark(self) -> Mark:
        """What the current stream has been given so far."""
        return torch.cuda.current_stream().record_event() if self._streams else None

    @contextmanager
    def on(self, index: int, *marks: Mark) -> Iterator[None]:
        """Inside, launches go to the stream `index`, which first waits for `marks`."""
        if not self._streams:
            yield
            return
        stream = self._streams[index]
        for mark in marks:
            if mark is not None:
                stream.wait_event(mark)
        self._running.append(stream)
        with torch.cuda.stream(stream):
            yield

    def join(self) -> None:
        """The current stream waits for every part."""
        for stream in self._running:
            torch.cuda.current_stream().wait_stream(stream)
        self._running.clear()


IN_ORDER = Beside()
"""Everything on the current stream."""
