"""Finds chunk, requests, graphs and memory fraction with which a model fits a rank, or says by how much it does not.

What the user gave stays as given; what is free is tried from the most useful value downwards.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

from sglang_sm120.limits import PAGE

from . import memory
from .errors import LaunchError
from .memory import Pools
from .model import Model

GIB = 1 << 30
REQUESTS = (64, 48, 32, 24, 16, 12, 8, 4, 2)
RATIOS = (memory.WINDOW_RATIO, 0.2, 0.4)
SMALL_CHUNKS = (4096, 2048, 1024, 512, 256)
TOKENS_PER_REQUEST = 4096
"""Tokens that each running request gets on average, before fewer requests are planned."""
MOST_STATIC = 0.92
"""Largest mem-fraction-static planned: people report that 0.95 starts and dies on a long request, 0.92 holds."""
GRAPH_SHARE = 0.1
"""Share of what the weights leave that CUDA graphs may take."""
CONTEXT_STEP = 1024
Step = Literal["none", "decode", "all"]
"""Passes that the step takes: none, decode and verification, or prefill too."""
LEAST_LEFT = GIB
"""What the weights must leave before it is worth trying values."""


@dataclass(frozen=True)
class Room:
    """One rank's memory and what is decided before the fit. Bytes.

    Attributes:
        whose: the card, for sentences.
        lines: what makes `usable` from the card's memory, as (what, bytes).
        usable: what SGLang sees as available before it loads the model.
        step: which passes the step takes.
        draft_tokens: tokens a request verifies per step with MTP or DSpark, 0 without.
        ep: ranks that divide the experts by number.
        device: `cuda` or `cpu`.
        sm12x: SGLang's own passes run its SM120 kernels.
        patched: SGLang's own passes take the step's `wo_a`, so that its bf16 one goes when the step is built.
    """

    whose: str
    lines: tuple[tuple[str, int], ...]
    usable: int
    tp: int
    step: Step
    draft_tokens: int
    ep: int = 1
    device: str = "cuda"
    sm12x: bool = False
    patched: bool = True

    def loaded(self, model: Model) -> dict[str, int]:
        """Bytes of one rank that are taken before SGLang sizes the cache, by what takes them."""
        taken = memory.weights(model, self.tp, self.device, ep=self.ep)
        if self.step != "none":
            taken |= memory.step_weights(model, self.tp, self.device, mtp=self.draft_tokens > 0)
            if self.patched:
                del taken[memory.WO_A]
        if self.draft_tokens:
            draft = memory.weights(model, self.tp, self.device, mtp=True, ep=self.ep)
            if self.step != "none" and self.patched:
                del draft[memory.WO_A]
            taken["draft model"] = sum(draft.values())
        if self.step != "none" and self.device == "cuda":
            taken["kernel scratch (the step)"] = memory.SCRATCH
        return taken

    def other_budget(self, model: Model) -> str | None:
        """What `wo_a` takes with the series and without it; None where the step serves nothing, or a CPU."""
        if self.step == "none" or self.device == "cpu":
            return None
        size = f"{memory.weights(model, self.tp, self.device)[memory.WO_A] / GIB:.2f} GiB"
        if self.patched:
            return f"wo_a is there in FP8 alone; beside SGLang as released it takes {size} in bf16 too."
        return f"SGLang is as released, so that wo_a takes {size} in bf16 too, which `make apply` saves."


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

    token_bytes is SGLang's `bytes_per_full_token`, trimmed the graph sizes that had no room, taken what weights and
    scratch take and left what they leave of `Room.usable`, other_budget what another `Room.patched` would take.
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
    lines: tuple[tuple[str, int], ...]
    taken: int = 0
    left: int = 0
    other_budget: str | None = None

    @property
    def window_needed(self) -> int:
        return memory.window_tokens_needed(self.chunk, self.requests)

    def concurrency(self) -> dict[int, int]:
        """Number of requests -> tokens of context each of them can have at the same time."""
        counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < self.requests] + [self.requests]
        return {count: min(self.context, self.pools.full // count // PAGE * PAGE) for count in counts}


class Unfit(LaunchError):
    """Nothing fits. The message has the numbers and no full stop yet: what to do instead, `make_plan` knows.

    Attributes:
        taken: bytes of weights and scratch of one rank.
    """

    def __init__(self, message: str, taken: int) -> None:
        super().__init__(message)
        self.taken = taken


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
        Unfit: nothing fits.
        LaunchError: a memory fraction that the user gave leaves too little beside it.
    """
    loaded = room.loaded(model)
    taken = sum(loaded.values())
    if room.usable - taken < LEAST_LEFT:
        raise Unfit(
            f"Weights and scratch take {gib(taken)} GiB of each rank at TP {room.tp} and {room.whose} leaves "
            f"{gib(room.usable)} GiB to SGLang",
            taken,
        )
    nearest = _Short(math.inf, "")
    for candidate in _candidates(given, chunk):
        attempt = _Try(model, room, given, loaded, *candidate)
        found = attempt.found()
        if isinstance(found, Fit):
            if (unused := found.lines[-1][1]) < 0:
                raise LaunchError(attempt.over(found, -unused))
            return replace(found, taken=taken, left=room.usable - taken, other_budget=room.other_budget(model))
        nearest = min(nearest, found)
    raise Unfit(
        f"Nothing fits on {room.whose} at TP {room.tp} beside {gib(taken)} GiB of weights and scratch: {nearest.why}",
        taken,
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


@dataclass(frozen=True)
class _Try:
    """One candidate: prefill chunk, running requests, window ratio."""

    model: Model
    room: Room
    given: Given
    loaded: dict[str, int]
    chunk: int
    requests: int
    ratio: float

    @property
    def drafts(self) -> int:
        """Layers of what drafts, each with a window pool."""
        if not self.room.draft_tokens:
            return 0
        return self.model.dspark.stages if self.model.dspark else 1

    @cached_property
    def graphs(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        left = self.room.usable - sum(self.loaded.values())
        return _graphs(self.model, self.room, self.given, self.requests, left)

    def beside(self, context: int) -> dict[str, int]:
        """Bytes that have to stay free beside weights and cache, where one request may have `context` tokens."""
        config, room, chunk = self.model.config, self.room, self.chunk
        taken = {
            "CUDA graphs": memory.graph_bytes(config, room.tp, self.graphs[0], room.draft_tokens),
            "activations": memory.activations(config, room.tp, chunk, self.requests),
            "allowance": memory.SLACK,
        }
        if room.draft_tokens and self.model.dspark:
            block, largest = room.draft_tokens - 1, max(self.graphs[0], default=self.requests)
            taken["logits of drafts (SGLang's)"] = memory.block_logits(config, block, largest)
        if room.device == "cuda" and room.step != "all":
            width = room.tp // room.ep
            taken["experts' workspace (SGLang's prefill)"] = memory.prefill_workspace(config, width, chunk)
        if room.device == "cpu":
            taken["indexer scores"] = memory.prefill_scores(chunk, context)
        elif room.sm12x and room.step != "all":
            taken["indexer scores (SGLang's prefill)"] = memory.prefill_scores(chunk, context)
        # What follows depends on the pools, which depend on it: an upper bound settles it.
        left = room.usable - sum(self.loaded.values()) - sum(taken.values())
        most = self._pools(self._tokens(left))
        if room.sm12x and room.step != "all":
            taken["window pages again (SGLang's prefill)"] = memory.split_pages(most)
        taken["token tables"] = memory.bookkeeping(most, self.requests, context, room.draft_tokens)
        return taken

    def pools(self, context: int) -> tuple[float, int, Pools]:
        """The memory fraction, SGLang's `available_bytes` and the pools."""
        room, loaded, beside = self.room, sum(self.loaded.values()), sum(self.beside(context).values())
        # Part of the pools, but not of what SGLang counts for them; of no more tokens than would fit without it.
        most = self._tokens(room.usable - loaded - beside)
        beside += memory.pool_padding(self.model.config, most, self.ratio, self.requests, self.drafts)
        fraction = min(MOST_STATIC, int((1 - beside / room.usable) * 1000) / 1000)
        static = self.given.static or max(0.0, fraction)
        available = int(room.usable * static) - loaded
        if room.device == "cpu":
            available = room.usable - loaded - beside
        return static, available, self._pools(min(self._tokens(available), self.given.max_tokens or 1 << 62))

    def context(self) -> int:
        """The largest context of which one request fits, in steps; 0 where none does."""
        longest = self.model.config["max_position_embeddings"]
        steps = range(longest // CONTEXT_STEP)
        # More context leaves less for the cache, so that one step fits, then none.
        count = bisect(steps, False, key=lambda step: not self._holds((step + 1) * CONTEXT_STEP))
        return longest if count == len(steps) and self._holds(longest) else count * CONTEXT_STEP

    def found(self) -> Fit | _Short:
        """The fit, or why it is none."""
        config, given = self.model.config, self.given
        context = given.context or self.context()
        static, available, pools = self.pools(context or CONTEXT_STEP)
        per_token = sum(memory.bytes_per_full_token(config, self.ratio, self.drafts).values())
        fixed = memory.request_state_bytes(config, self.requests, self.drafts)
        numbers = (
            f"{gib(max(0, available - fixed))} GiB for the cache hold {pools.full} tokens of {per_token / 1024:.1f} KiB"
        )
        needed = memory.window_tokens_needed(self.chunk, self.requests)
        if pools.swa < needed:
            return _Short(
                needed / max(1, pools.swa),
                f"{numbers}, {pools.swa} of them in the window pool, and a chunk of {self.chunk} with {self.requests} "
                f"running requests needs {needed} there",
            )
        needed = (given.context or CONTEXT_STEP) + PAGE
        if pools.full < needed:
            wanted = f"one request of context length {given.context}" if given.context else "the smallest request"
            return _Short(needed / pools.full, f"{numbers}, and {wanted} needs {needed}")
        needed = self.requests * TOKENS_PER_REQUEST
        if not given.requests and self.requests > min(REQUESTS) and pools.full < needed:
            return _Short(
                needed / pools.full, f"{numbers}, and {self.requests} requests of {TOKENS_PER_REQUEST} need {needed}"
            )
        return Fit(
            self.chunk, self.requests, context, self.ratio, static, *self.graphs, pools, per_token,
            self._lines(context, pools),
        )  # fmt: skip

    def over(self, found: Fit, missing: int) -> str:
        """A sentence about a memory fraction that the user gave, `missing` bytes too large for what stays beside."""
        beside = sum(self.beside(found.context).values())
        free = replace(self, given=replace(self.given, static=None))
        context = self.given.context or free.context()
        return (
            f"--mem-fraction-static is {found.static} and leaves {gib(beside - missing)} of {gib(beside)} GiB that "
            f"graphs, activations and prefill take beside weights and cache at a context length of {found.context}: "
            f"leave it out, or give {free.pools(context)[0]} or less with --context-length {context}."
        )

    def _holds(self, context: int) -> bool:
        return self.pools(context)[2].full >= context + PAGE

    def _lines(self, context: int, pools: Pools) -> tuple[tuple[str, int], ...]:
        cache = sum(memory.pool_bytes(self.model.config, pools, self.drafts).values())
        taken = {**self.loaded, "cache pools": cache, **self.beside(context)}
        lines = (*self.room.lines, *((name, -size) for name, size in taken.items() if size))
        return (*lines, ("unused", self.room.usable - sum(taken.values())))

    def _tokens(self, available: int) -> int:
        return memory.tokens_that_fit(self.model.config, available, self.ratio, self.requests, self.drafts)

    def _pools(self, tokens: int) -> Pools:
        return memory.pool_sizes(self.model.config, tokens, self.ratio, self.requests, self.drafts)


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


def gib(size: int) -> str:
    return f"{size / GIB:.1f}"
