"""Parts of a layer that need nothing of each other run beside each other, on streams of the step's own.

SGLang's alternate streams have no priority: the small kernels of the compressors and the indexer would wait there until
a large projection has left the SMs, and attention for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch

KEYS, ENTRIES, INDEX_KEYS, INDEX_QUERIES, SHARED = range(5)
"""What runs beside the queries of a layer's attention, and the shared expert beside the routed ones, by its stream's
number."""
PRIORITIES = (-1, -1, -1, -1, 0)
"""Of each; lower goes first. A graph keeps them."""
Mark: TypeAlias = torch.cuda.Event | None
"""A point of a stream that another one can wait for; None where there is one stream alone."""


def prioritised() -> list[torch.cuda.Stream]:
    """The streams for `Beside`, on the current device."""
    return [torch.cuda.Stream(priority=priority) for priority in PRIORITIES]


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
