"""Finds chunk, requests, graphs and memory fraction with which a model fits a rank, or says by how much it does not.

What the user gave stays as given; what is free is tried from the most useful value downwards.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from . import memory
from .errors import LaunchError
from .memory import PAGE, Pools
from .model import Model

GIB = 1 << 30
REQUESTS = (64, 48, 32, 24, 16, 12, 8, 4, 2)
RATIOS = (memory.WINDOW_RATIO, 0.2, 0.4)
SMALL_CHUNKS = (2048, 1024, 512, 256)
TOKENS_PER_REQUEST = 4096
"""Tokens that each running request gets on average, before fewer requests are planned."""
MOST_STATIC = 0.92
"""Largest mem-fraction-static planned: people report that 0.95 starts and dies on a long request, 0.92 holds."""
GRAPH_SHARE = 0.1
"""Share of what the weights leave that CUDA graphs may take."""
CONTEXT_STEP = 1024
LEAST_LEFT = GIB
"""What the weights must leave before it is worth trying values."""


@dataclass(frozen=True)
class Room:
    """One rank's memory and what is decided before the fit. Bytes.

    Attributes:
        whose: the card, for sentences.
        lines: what makes `usable` from the card's memory, as (what, bytes).
        usable: what SGLang sees as available before it loads the model.
        overlay: the experts' scales stay one byte.
        draft_tokens: tokens a request verifies per step with MTP, 0 without.
        device: `cuda` or `cpu`.
    """

    whose: str
    lines: tuple[tuple[str, int], ...]
    usable: int
    tp: int
    overlay: bool
    draft_tokens: int
    device: str = "cuda"


@dataclass(frozen=True)
class Given:
    """Values that are not free; None where they are."""

    chunk: int | None = None
    requests: int | None = None
    context: int | None = None
    window_ratio: float | None = None
    static: float | None = None
    graphs: tuple[int, ...] | None = None
    max_graph: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class Fit:
    """What was found. `lines` is the budget of one rank, as (what, bytes), ending with what is left unused.

    token_bytes is SGLang's `bytes_per_full_token`, available its `available_bytes`, trimmed the graph sizes that had
    no room.
    """

    chunk: int
    requests: int
    context: int
    window_ratio: float
    static: float
    graphs: tuple[int, ...]
    trimmed: tuple[int, ...]
    pools: Pools
    token_bytes: float
    available: int
    lines: tuple[tuple[str, int], ...]

    @property
    def window_needed(self) -> int:
        return memory.window_tokens_needed(self.chunk, self.requests)

    def concurrency(self) -> dict[int, int]:
        """Number of requests -> tokens of context each of them can have at the same time."""
        counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < self.requests] + [self.requests]
        return {count: min(self.context, self.pools.full // count // PAGE * PAGE) for count in counts}


def graph_sizes(requests: int) -> tuple[int, ...]:
    """Numbers of requests to capture: each up to 8, then steps that grow, the largest included.

    They count requests: with MTP SGLang multiplies them by the draft tokens itself.
    """
    steps = (*range(1, 9), *range(10, 17, 2), *range(20, 33, 4), *range(40, 65, 8), *range(80, 129, 16))
    more = range(160, requests + 1, 32)
    return tuple(sorted({size for size in (*steps, *more) if size <= requests} | {requests}))


def fit(model: Model, room: Room, given: Given, chunk: int) -> Fit:
    """The first fit of the preferred values; `chunk` is the preferred prefill chunk.

    Raises:
        LaunchError: nothing fits; the sentence has the numbers.
    """
    weights = memory.weights(model, room.tp, room.overlay)
    left = room.usable - sum(weights.values())
    if left < LEAST_LEFT:
        raise LaunchError(
            f"The weights take {_gib(sum(weights.values()))} GiB of each rank at TP {room.tp} and {room.whose} leaves "
            f"{_gib(room.usable)} GiB to SGLang: {_advice(model, room)}."
        )
    nearest = _Short(math.inf, "")
    for candidate in _candidates(given, chunk):
        found = _try(model, room, given, weights, candidate)
        if isinstance(found, Fit):
            return found
        nearest = min(nearest, found)
    raise LaunchError(
        f"Nothing fits on {room.whose} at TP {room.tp} beside {_gib(sum(weights.values()))} GiB of weights: "
        f"{nearest.why}."
    )


class _Short(NamedTuple):
    """By which factor a candidate does not fit, and the numbers in words."""

    factor: float
    why: str


def _candidates(given: Given, preferred: int) -> Iterator[tuple[int, int, float]]:
    """(chunk, requests, window ratio) in order of preference."""
    chunks = [given.chunk] if given.chunk else [preferred, *(size for size in SMALL_CHUNKS if size < preferred)]
    requests = [given.requests] if given.requests else list(REQUESTS)
    ratios = [given.window_ratio] if given.window_ratio else list(RATIOS)
    # A chunk below 2,048 makes prefill slow, so first fewer requests and a larger share for the window.
    for low, high in ((2048, None), (0, 2048)):
        usable = [size for size in chunks if low <= size and (high is None or size < high)]
        for ratio, count, size in itertools.product(ratios, requests, usable):
            yield size, count, ratio


def _try(
    model: Model, room: Room, given: Given, weights: dict[str, int], candidate: tuple[int, int, float]
) -> Fit | _Short:
    """The fit of one candidate, or why it is none."""
    chunk, requests, ratio = candidate
    config, mtp = model.config, room.draft_tokens > 0
    loaded, longest = sum(weights.values()), config["max_position_embeddings"]
    wanted = given.context or longest
    sizes, trimmed = _graphs(model, room, given, requests, room.usable - loaded)
    draft = sum(memory.weights(model, room.tp, room.overlay, mtp=True).values()) if mtp else 0
    beside = {
        "CUDA graphs": memory.graph_bytes(config, room.tp, sizes, room.draft_tokens),
        "activations": memory.activations(config, room.tp, chunk, requests),
        "kernel scratch": memory.SCRATCH if room.overlay and room.device == "cuda" else 0,
        "draft model": draft,
        "allowance": memory.SLACK,
    }
    per_token = sum(memory.bytes_per_full_token(config, ratio, mtp).values())
    # The tables beside the pools depend on the tokens, which depend on them: an upper bound settles it.
    most = max(0, int((room.usable - loaded) / per_token))
    tables = memory.bookkeeping(
        memory.pool_sizes(config, most, ratio, mtp), requests, min(wanted, max(most, PAGE)), room.draft_tokens
    )
    beside["token tables"] = tables
    static = given.static or min(MOST_STATIC, int((1 - sum(beside.values()) / room.usable) * 1000) / 1000)
    available = int(room.usable * static) - loaded
    if room.device == "cpu":
        available = room.usable - loaded - sum(beside.values())
    tokens = min(int(max(0, available) / per_token), given.max_tokens or 1 << 62)
    pools = memory.pool_sizes(config, tokens, ratio, mtp)
    numbers = f"{_gib(max(0, available))} GiB for the cache hold {pools.full} tokens of {per_token / 1024:.1f} KiB"
    needed = memory.window_tokens_needed(chunk, requests)
    if pools.swa < needed:
        return _Short(
            needed / max(1, pools.swa),
            f"{numbers}, {pools.swa} of them in the window pool, and a chunk of {chunk} with {requests} running "
            f"requests needs {needed} there",
        )
    context = given.context or min(longest, (pools.full - PAGE) // CONTEXT_STEP * CONTEXT_STEP)
    if context + PAGE > pools.full and given.context:
        needed = context + PAGE
        return _Short(needed / pools.full, f"{numbers}, and one request of context length {context} needs {needed}")
    if not given.requests and requests > min(REQUESTS) and pools.full < requests * TOKENS_PER_REQUEST:
        needed = requests * TOKENS_PER_REQUEST
        return _Short(needed / pools.full, f"{numbers}, and {requests} requests of {TOKENS_PER_REQUEST} need {needed}")
    if context < CONTEXT_STEP:
        needed = CONTEXT_STEP + PAGE
        return _Short(needed / pools.full, f"{numbers}, and one request needs at least {needed}")
    pool_bytes = sum(memory.pool_bytes(config, pools, mtp).values())
    lines = [*room.lines, *((name, -size) for name, size in weights.items())]
    lines += [("cache pools", -pool_bytes), *((name, -size) for name, size in beside.items() if size)]
    unused = room.usable - loaded - pool_bytes - sum(beside.values())
    return Fit(
        chunk, requests, context, ratio, static, sizes, trimmed, pools, per_token, available,
        (*lines, ("unused", unused)),
    )  # fmt: skip


def _graphs(
    model: Model, room: Room, given: Given, requests: int, left: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The sizes to capture and those that were trimmed; at least sizes 1 and 2 stay where two requests can run."""
    if room.device == "cpu":
        return (), ()
    if given.graphs is not None:
        return given.graphs, ()
    sizes = graph_sizes(requests)
    if given.max_graph is not None:
        return tuple(size for size in sizes if size < given.max_graph) + (given.max_graph,), ()
    kept = sizes
    while len(kept) > 2 and memory.graph_bytes(model.config, room.tp, kept, room.draft_tokens) > GRAPH_SHARE * left:
        kept = kept[:-1]
    return kept, sizes[len(kept) :]


def _advice(model: Model, room: Room) -> str:
    if room.device == "cpu":
        return "a CPU serves small checkpoints only"
    for tp in (2, 4, 8):
        needed = sum(memory.weights(model, tp, room.overlay).values())
        if tp > room.tp and room.usable - needed >= 4 * GIB:
            return f"use {tp} such cards (TP {tp}, {_gib(needed)} GiB of weights each)"
    return "use cards with more memory"


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}"


