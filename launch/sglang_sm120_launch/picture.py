"""Line charts as an SVG: panels side by side over a shared x axis of powers of two, one legend.

Written as text: SGLang's own requirements bring no plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

WIDTH, HEIGHT = 560, 420
LEFT, RIGHT, TOP, BOTTOM = 74, 22, 34, 52
HEADER = 74
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#666666")
"""Okabe and Ito's palette, told apart with any colour vision: https://jfly.uni-koeln.de/color."""
INK, GRID = "#222222", "#DDDDDD"


class Panel(NamedTuple):
    """One chart: label of each series -> its points (x, y), positive numbers. `log` makes the y axis logarithmic."""

    title: str
    x_label: str
    y_label: str
    series: Mapping[str, Sequence[tuple[float, float]]]
    log: bool = False


def draw(heading: str, panels: Sequence[Panel], path: Path) -> None:
    """Write the picture. A series has the same colour in every panel; one without points is left out."""
    labels = list(dict.fromkeys(label for panel in panels for label in panel.series))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    width, height = WIDTH * len(panels), HEADER + HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(16, 20, heading, 17, "start"),
    ]
    x = 16
    for label in labels:
        parts += [_line([(x, 52), (x + 28, 52)], colours[label]), _dot(x + 14, 52, colours[label])]
        parts.append(_text(x + 36, 52, label, 14, "start"))
        x += 60 + 8 * len(label)
    for i, panel in enumerate(panels):
        parts += [f'<g transform="translate({i * WIDTH} {HEADER})">', *_panel(panel, colours), "</g>"]
    path.write_text("\n".join([*parts, "</svg>", ""]), encoding="utf-8")


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Round numbers for an axis that shows `low` to `high`: the first is not above `low`, the last not below `high`.

    Linear axes begin at 0. Logarithmic ones have 1, 2 and 5 of each decade, whole decades beyond three of them.
    """
    if log:
        steps = (1.0, 2.0, 5.0) if high / low < 1000 else (1.0,)
        first, last = math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1
        marks = [step * 10.0**power for power in range(first, last + 1) for step in steps]
        start = max(i for i, mark in enumerate(marks) if mark <= low * (1 + 1e-9))
        stop = min(i for i, mark in enumerate(marks) if mark >= high * (1 - 1e-9))
        return marks[start : max(stop, start + 1) + 1]
    rough = high / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step * power for step in (1, 2, 5, 10) if step * power >= rough * (1 - 1e-9))
    return [step * i for i in range(math.ceil(high / step - 1e-9) + 1)]


def _panel(panel: Panel, colours: Mapping[str, str]) -> Iterator[str]:
    points = [point for series in panel.series.values() for point in series]
    x0, x1, y0, y1 = LEFT, WIDTH - RIGHT, HEIGHT - BOTTOM, TOP
    middle = (x0 + x1) / 2, (y0 + y1) / 2
    yield _text(middle[0], 14, panel.title, 15)
    yield _text(middle[0], y0 + 38, panel.x_label, 13)
    yield _text(16, middle[1], panel.y_label, 13, turned=True)
    if not points:
        yield _text(*middle, "no data", 14)
        return
    marks = sorted({x for x, _ in points})
    heights = ticks(min(y for _, y in points), max(y for _, y in points), panel.log)

    def place(x: float, y: float) -> tuple[float, float]:
        span = math.log2(marks[-1] / marks[0]) or 1.0
        across = (math.log2(x / marks[0]) / span) if len(marks) > 1 else 0.5
        if panel.log:
            up = math.log(y / heights[0]) / math.log(heights[-1] / heights[0])
        else:
            up = y / heights[-1]
        return x0 + 14 + across * (x1 - x0 - 28), y0 - up * (y0 - y1)

    for height in heights:
        y = place(marks[0], height)[1]
        yield _line([(x0, y), (x1, y)], GRID, 1)
        yield _text(x0 - 8, y, f"{height:,g}" if height < 1e6 else f"{height:.0e}", 12, "end")
    for mark in marks:
        x = place(mark, heights[-1])[0]
        yield _line([(x, y0), (x, y0 + 5)], INK, 1)
        yield _text(x, y0 + 16, f"{mark:g}", 12)
    yield _line([(x0, y1), (x0, y0), (x1, y0)], INK, 1)
    for label, series in panel.series.items():
        placed = [place(x, y) for x, y in sorted(series)]
        yield _line(placed, colours[label])
        yield from (_dot(x, y, colours[label]) for x, y in placed)


def _text(x: float, y: float, text: str, size: int, anchor: str = "middle", turned: bool = False) -> str:
    turn = f' transform="rotate(-90 {x} {y})"' if turned else ""
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="middle"{turn}'
    return f'<text {where} font-size="{size}" fill="{INK}">{escape(text)}</text>'


def _line(points: Sequence[tuple[float, float]], colour: str, width: int = 2) -> str:
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline points="{places}" fill="none" stroke="{colour}" stroke-width="{width}"/>'


def _dot(x: float, y: float, colour: str) -> str:
    return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
