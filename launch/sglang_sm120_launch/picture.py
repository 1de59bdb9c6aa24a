"""Line charts as a PNG: panels side by side over a shared x axis of powers of two, one legend.

Drawn with Pillow, which SGLang's own requirements bring; they bring no plotting library.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

SCALE = 2
"""Drawn at twice the size and reduced, which smooths the lines."""
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
    image = Image.new("RGB", (WIDTH * len(panels) * SCALE, (HEADER + HEIGHT) * SCALE), "white")
    pen = ImageDraw.Draw(image)
    labels = list(dict.fromkeys(label for panel in panels for label in panel.series))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    _text(pen, (16, 20), heading, 17, "lm")
    x = 16.0
    for label in labels:
        _line(pen, [(x, 52), (x + 28, 52)], colours[label])
        _dot(pen, (x + 14, 52), colours[label])
        _text(pen, (x + 36, 52), label, 14, "lm")
        x += 60 + _font(14).getlength(label) / SCALE
    for i, panel in enumerate(panels):
        _panel(pen, panel, i * WIDTH, colours)
    image.resize((image.width // SCALE, image.height // SCALE), Image.Resampling.LANCZOS).save(path, "PNG")


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


def _panel(pen: ImageDraw.ImageDraw, panel: Panel, left: int, colours: Mapping[str, str]) -> None:
    points = [point for series in panel.series.values() for point in series]
    x0, x1 = left + LEFT, left + WIDTH - RIGHT
    y0, y1 = HEADER + HEIGHT - BOTTOM, HEADER + TOP
    _text(pen, ((x0 + x1) / 2, HEADER + 14), panel.title, 15, "mm")
    _text(pen, ((x0 + x1) / 2, y0 + 38), panel.x_label, 13, "mm")
    _sideways(pen, (left + 16, (y0 + y1) / 2), panel.y_label, 13)
    if not points:
        _text(pen, ((x0 + x1) / 2, (y0 + y1) / 2), "no data", 14, "mm")
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
        _line(pen, [(x0, y), (x1, y)], GRID, 1)
        _text(pen, (x0 - 8, y), f"{height:,g}" if height < 1e6 else f"{height:.0e}", 12, "rm")
    for mark in marks:
        x = place(mark, heights[-1])[0]
        _line(pen, [(x, y0), (x, y0 + 5)], INK, 1)
        _text(pen, (x, y0 + 16), f"{mark:g}", 12, "mm")
    _line(pen, [(x0, y1), (x0, y0), (x1, y0)], INK, 1)
    for label, series in panel.series.items():
        placed = [place(x, y) for x, y in sorted(series)]
        if len(placed) > 1:
            _line(pen, placed, colours[label])
        for dot in placed:
            _dot(pen, dot, colours[label])


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size * SCALE)
    assert isinstance(font, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return font


def _text(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int, anchor: str) -> None:
    pen.text((at[0] * SCALE, at[1] * SCALE), text, fill=INK, font=_font(size), anchor=anchor)


def _sideways(pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: int) -> None:
    font = _font(size)
    label = Image.new("L", (math.ceil(font.getlength(text)) + 4, size * SCALE * 2), 0)
    ImageDraw.Draw(label).text((2, label.height // 2), text, fill=255, font=font, anchor="lm")
    turned = label.rotate(90, expand=True)
    corner = (round(at[0] * SCALE - turned.width / 2), round(at[1] * SCALE - turned.height / 2))
    pen.bitmap(corner, turned, fill=INK)


def _line(pen: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str, width: int = 2) -> None:
    pen.line([(x * SCALE, y * SCALE) for x, y in points], fill=colour, width=width * SCALE, joint="curve")


def _dot(pen: ImageDraw.ImageDraw, at: tuple[float, float], colour: str) -> None:
    x, y = at[0] * SCALE, at[1] * SCALE
    pen.ellipse((x - 4 * SCALE, y - 4 * SCALE, x + 4 * SCALE, y + 4 * SCALE), fill=colour)
