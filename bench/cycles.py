"""Where the time of a decode cycle goes, by a torch profiler trace: graph replays, kernels between them, waiting.

A cycle begins with a replay of the graph that has the most kernels, the target's decode or verification, and ends with
the next one. With speculation other graphs follow in it: the draft's, and what prepares it. Streams overlap inside a
replay, so that what kernels take together is more than the time in which any of them runs.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import traces
from sglang_sm120_launch.picture import COLOURS
from traces import Kernel

WAITS = re.compile(r"Synchronize$|Memcpy(?!\w*Async)")
COPIES = re.compile(r"Memcpy\w*Async")
LONGEST_COPY_US = 100.0
"""A copy from or to memory that is not pinned waits for the GPU, and only how long it takes tells it from others. Of
those in the pictures of `results` all took 35 µs or less but one, which waited for 2,839."""
LAUNCHES = re.compile(r"Launch")


class Span(NamedTuple):
    """From when to when, in µs of the trace."""

    start: float
    end: float

    @property
    def us(self) -> float:
        return self.end - self.start


def waits(name: str, span: Span) -> bool:
    """Whether the host waits for the GPU in this call."""
    return bool(WAITS.search(name) or (COPIES.search(name) and span.us > LONGEST_COPY_US))


class Replay(NamedTuple):
    """One replay of a graph: its kernels in the order in which they began."""

    kernels: tuple[Kernel, ...]

    @property
    def span(self) -> Span:
        return Span(self.kernels[0].start, max(kernel.end for kernel in self.kernels))

    @property
    def graph(self) -> tuple[tuple[str, int], ...]:
        """What the same graph has in every replay: how many kernels of each name."""
        return tuple(sorted(Counter(kernel.name for kernel in self.kernels).items()))


@dataclass(frozen=True)
class Cycle:
    """From the target's replay to the next one: replays, kernels of no graph, and calls of the thread that launches."""

    span: Span
    replays: tuple[Replay, ...]
    others: tuple[Kernel, ...]
    calls: tuple[tuple[str, Span], ...]

    @property
    def between(self) -> list[Kernel]:
        """Those kernels of no graph that begin while no graph runs; the rest run beside one."""
        spans = [replay.span for replay in self.replays]
        return [k for k in self.others if not any(span.start <= k.start < span.end for span in spans)]


def busy(spans: Iterable[Span | Kernel]) -> float:
    """Microseconds that at least one of them covers."""
    total, until = 0.0, float("-inf")
    for span in sorted(spans, key=lambda span: span.start):
        total += max(0.0, span.end - max(span.start, until))
        until = max(until, span.end)
    return total


def replays(found: Iterable[Kernel]) -> list[Replay]:
    """The graph replays among the kernels, in order; those that the trace's edges cut are of a graph of their own."""
    by_launch: dict[int, list[Kernel]] = defaultdict(list)
    for kernel in found:
        if kernel.graph:
            by_launch[kernel.launch].append(kernel)
    made = [Replay(tuple(sorted(group, key=lambda kernel: kernel.start))) for group in by_launch.values()]
    return sorted(made, key=lambda replay: replay.span.start)


def cycles(found: Sequence[Kernel], calls: Sequence[tuple[str, Span]]) -> list[Cycle]:
    """The whole cycles of a trace, those alone that have the most frequent sequence of graphs.

    Raises:
        ValueError: the trace has none.
    """
    made = replays(found)
    repeated = {graph for graph, times in Counter(replay.graph for replay in made).items() if times > 1}
    if not repeated:
        raise ValueError(f"no CUDA graph was launched twice among {len(found)} kernels: nothing decoded from graphs.")
    target = max(repeated, key=lambda graph: sum(count for _, count in graph))
    begins = [replay.span.start for replay in made if replay.graph == target]
    cut = []
    for start, end in zip(begins, begins[1:], strict=False):
        inside = [replay for replay in made if start <= replay.span.start < end]
        others = [kernel for kernel in found if not kernel.graph and start <= kernel.start < end]
        of_host = [(name, span) for name, span in calls if start <= span.start < end]
        cut.append(Cycle(Span(start, end), tuple(inside), tuple(others), tuple(of_host)))
    usual = Counter(tuple(replay.graph for replay in cycle.replays) for cycle in cut).most_common(1)[0][0]
    return [cycle for cycle in cut if tuple(replay.graph for replay in cycle.replays) == usual]


def read(trace: Path) -> list[Cycle]:
    """`cycles` of a chrome trace (.json.gz)."""
    events = traces.events_of(trace)
    calls = traces.calls_of(events)
    threads = Counter(call.get("tid") for call in calls.values() if "GraphLaunch" in call["name"])
    thread = threads.most_common(1)[0][0] if threads else None
    spans = [
        (call["name"], Span(call["ts"], call["ts"] + call["dur"]))
        for call in calls.values()
        if call.get("tid") == thread
    ]
    return cycles(traces.kernels_of(events, calls), spans)


def account(found: Sequence[Cycle], known: Mapping[str, Mapping[Any, str]], speculates: bool) -> dict[str, Any]:
    """The mean cycle in µs: its replays in order, what runs between and beside them, idle GPU, and the host.

    known: as `traces.ranges` gives it. speculates: whether the server does.
    """
    times = len(found)

    def mean(values: Iterable[float]) -> float:
        return round(sum(values) / times, 1)

    parts = []
    for place, first in enumerate(found[0].replays):
        same = [cycle.replays[place] for cycle in found]
        ops: dict[str, float] = defaultdict(float)
        for kernel in (kernel for replay in same for kernel in replay.kernels):
            ops[traces.op_of(kernel, known)] += kernel.us / times
        parts.append({
            "graph": name_of(place, speculates), "launches": len(first.kernels),
            "us": mean(replay.span.us for replay in same), "busy_us": mean(busy(replay.kernels) for replay in same),
            "kernels_us": mean(sum(kernel.us for kernel in replay.kernels) for replay in same),
            "ops": {op: round(us, 1) for op, us in sorted(ops.items(), key=lambda item: -item[1])},
        })  # fmt: skip
    everything = [[k for replay in cycle.replays for k in replay.kernels] + [*cycle.others] for cycle in found]
    waited = [[span.us for name, span in cycle.calls if waits(name, span)] for cycle in found]
    launching = [[span.us for name, span in cycle.calls if LAUNCHES.search(name)] for cycle in found]
    names = Counter(traces.op_of(kernel, known) for cycle in found for kernel in cycle.between)
    between = sum(len(cycle.between) for cycle in found)
    return {
        "cycles": times,
        "us": mean(cycle.span.us for cycle in found),
        "idle_us": mean(cycle.span.us - busy(kernels) for cycle, kernels in zip(found, everything, strict=True)),
        "replays": parts,
        "between_us": mean(cycle.span.us - busy(replay.span for replay in cycle.replays) for cycle in found),
        "between_kernels_us": mean(sum(kernel.us for kernel in cycle.between) for cycle in found),
        "between_launches": round(between / times, 1),
        "between": {name: round(count / times, 1) for name, count in names.most_common(20)},
        "beside_launches": round((sum(len(cycle.others) for cycle in found) - between) / times, 1),
        "host_waits_us": mean(sum(each) for each in waited),
        "host_waits": round(sum(map(len, waited)) / times, 1),
        "host_launches_us": mean(sum(each) for each in launching),
    }


def prefill(found: Sequence[Kernel], known: Mapping[str, Mapping[Any, str]]) -> dict[str, Any]:
    """All that ran from the first kernel to the last, in µs, by op; `known` as for `account`.

    Raises:
        ValueError: nothing ran.
    """
    if not found:
        raise ValueError("the trace of the prefill has no kernel.")
    ops: dict[str, float] = defaultdict(float)
    for kernel in found:
        ops[traces.op_of(kernel, known)] += kernel.us
    span = Span(min(kernel.start for kernel in found), max(kernel.end for kernel in found))
    return {
        "us": round(span.us, 1), "idle_us": round(span.us - busy(found), 1), "launches": len(found),
        "ops": {op: round(us, 1) for op, us in sorted(ops.items(), key=lambda item: -item[1])},
    }  # fmt: skip


def prefill_table(told: Mapping[str, Any]) -> str:
    """A prefill for reading."""
    lines = [f"prefill {told['us']:9.1f} us, GPU idle {told['idle_us']:.1f} us, {told['launches']} kernels"]
    shares = ((op, us, us / told["us"]) for op, us in [*told["ops"].items()][:16])
    return "\n".join(lines + [f"    {op[:60]:60s} {us:8.1f} us {share:4.0%}" for op, us, share in shares])


def name_of(place: int, speculates: bool) -> str:
    """A graph of a cycle in words."""
    if place == 0:
        return "verify" if speculates else "decode"
    return f"{'draft' if speculates else 'other'} {place}"


def table(told: Mapping[str, Any]) -> str:
    """An account for reading."""
    lines = [f"cycle {told['us']:9.1f} us, GPU idle {told['idle_us']:.1f} us; mean of {told['cycles']}"]
    for part in told["replays"]:
        lines.append(
            f"  {part['graph']:10s}{part['us']:9.1f} us, some kernel runs {part['busy_us']:.1f} us; "
            f"{part['launches']} kernels of {part['kernels_us']:.1f} us"
        )
        lines += [f"    {op[:60]:60s} {us:8.1f} us" for op, us in [*part["ops"].items()][:12]]
    lines.append(
        f"  between   {told['between_us']:9.1f} us, {told['between_launches']:.1f} kernels of "
        f"{told['between_kernels_us']:.1f} us, {told['beside_launches']:.1f} more beside graphs; "
        f"the host waits {told['host_waits']:.1f} times, "
        f"{told['host_waits_us']:.1f} us, and launches for {told['host_launches_us']:.1f} us"
    )
    lines += [f"    {name[:60]:60s} {count:8.1f} launches" for name, count in told["between"].items()]
    return "\n".join(lines)


WIDTH, ROW, LEFT, TOP = 1600, 22, 110, 56


def timeline(
    cycle: Cycle, heading: str, known: Mapping[str, Mapping[Any, str]], speculates: bool, path: Path
) -> None:
    """Draw one cycle as an SVG: a row for each stream and one for the host's calls, kernels coloured by op."""
    kernels = [kernel for replay in cycle.replays for kernel in replay.kernels] + [*cycle.others]
    streams = list(dict.fromkeys(kernel.stream for kernel in sorted(kernels, key=lambda kernel: kernel.start)))
    time: Counter[str] = Counter()
    for kernel in kernels:
        time[traces.op_of(kernel, known)] += kernel.us
    coloured = dict(zip((op for op, _ in time.most_common(len(COLOURS) - 1)), COLOURS, strict=False))
    last = max([cycle.span.end, *(kernel.end for kernel in kernels)])
    scale = (WIDTH - LEFT - 20) / (last - cycle.span.start)

    def box(start: float, end: float, row: int, colour: str, title: str) -> str:
        x, width = LEFT + (start - cycle.span.start) * scale, max((end - start) * scale, 0.3)
        y = TOP + row * ROW
        return (
            f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{ROW - 5}" fill="{colour}">'
            f"<title>{escape(title)}</title></rect>"
        )

    def label(x: float, y: float, text: str) -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" font-size="13">{escape(text)}</text>'

    height = TOP + (len(streams) + 2) * ROW + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>', label(10, 20, heading),
    ]  # fmt: skip
    x = 10.0
    for op, colour in coloured.items():
        parts += [f'<rect x="{x:.1f}" y="30" width="12" height="12" fill="{colour}"/>', label(x + 16, 41, op[:28])]
        x += 36 + 7 * len(op[:28])
    for place, replay in enumerate(cycle.replays):
        parts.append(box(*replay.span, 0, "#DDDDDD", f"{replay.span.us:.1f} us"))
        at = LEFT + (replay.span.start - cycle.span.start) * scale
        parts.append(label(at + 2, TOP + ROW - 9, name_of(place, speculates)))
    for row, stream in enumerate(streams, 1):
        parts.append(label(10, TOP + row * ROW + 13, f"stream {stream}"))
        for kernel in (kernel for kernel in kernels if kernel.stream == stream):
            op = traces.op_of(kernel, known)
            title = f"{op}, {kernel.us:.1f} us: {kernel.name[:100]}"
            parts.append(box(kernel.start, kernel.end, row, coloured.get(op, COLOURS[-1]), title))
    parts.append(label(10, TOP + (len(streams) + 1) * ROW + 13, "host"))
    for name, span in cycle.calls:
        colour = "#D55E00" if waits(name, span) else "#888888"
        parts.append(box(span.start, min(span.end, last), len(streams) + 1, colour, f"{name}, {span.us:.1f} us"))
    parts.append(label(LEFT, height - 10, f"{cycle.span.us:.0f} us from left to right; grey: other kernels and calls"))
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")
