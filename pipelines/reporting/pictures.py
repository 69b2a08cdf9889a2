"""Pictures for an HTML file: embedded images, and coordinates of curves and heat maps that a template renders as SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.colors import to_hex
from matplotlib.ticker import LogLocator, MaxNLocator
from PIL import Image

# Embedding adds a third, and a phone must hold all decoded images in memory.
_MOST_BYTES = 2_000_000
_REDUCED_SIDE = 1600
_TILE_SIDE = 128
_COLOURS = "magma"
# Heat maps of more columns show their numbers only in tooltips.
_MOST_NUMBERED_COLUMNS = 12


class Embedded(NamedTuple):
    """An image file as part of the page."""

    uri: str
    width: int
    """Width in pixels, as embedded."""
    height: int
    remark: str
    """Addition to the caption; may be empty."""


def embedded(path: Path) -> Embedded:
    """Embed a PNG; one above 2 MB is reduced, with a remark."""
    content, remark = path.read_bytes(), ""
    with Image.open(io.BytesIO(content)) as image:
        width, height = image.size
        if len(content) > _MOST_BYTES:
            remark = f"reduced from {width} x {height} pixels"
            content, (width, height) = _reduced(image, _REDUCED_SIDE)
    return Embedded(_uri(content), width, height, remark)


def tile(path: Path) -> str:
    """Encode a small image as a URI: PNG, at most 128 pixels per side."""
    content = path.read_bytes()
    with Image.open(io.BytesIO(content)) as image:
        if max(image.size) > _TILE_SIDE:
            content, _ = _reduced(image, _TILE_SIDE)
    return _uri(content)


def _reduced(image: Image.Image, side: int) -> tuple[bytes, tuple[int, int]]:
    small = image.convert("RGB") if image.mode not in ("L", "RGB", "RGBA") else image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "png")
    return buffer.getvalue(), small.size


def _uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


class Tick(NamedTuple):
    """A mark on an axis."""

    at: float
    text: str


class Line(NamedTuple):
    """A curve in the chart's coordinates."""

    name: str
    points: list[tuple[float, float]]
    last: float
    """The line's last value, in the metric's unit."""


class Chart(NamedTuple):
    """A line chart in the coordinates of its view box: 0 0 320 200, y downwards."""

    title: str
    lines: list[Line]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    references: list[Tick]
    """Horizontal reference lines."""


class _Axis(NamedTuple):
    low: float
    high: float
    first: float
    """Coordinate at which `low` is drawn."""
    last: float
    """Coordinate at which `high` is drawn."""
    logarithmic: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log10(number) if self.logarithmic else number for number in (self.low, self.high, value))
        return round(self.first + (value - low) / (high - low) * (self.last - self.first), 1)

    def ticks(self) -> list[Tick]:
        few_decades = self.logarithmic and self.high < 100 * self.low
        locator = LogLocator(subs=(1, 3) if few_decades else (1,), numticks=6) if self.logarithmic else MaxNLocator(4)
        values = (float(value) for value in locator.tick_values(self.low, self.high))
        return [Tick(self.at(value), f"{value:g}") for value in values if self.low <= value <= self.high]


def line_chart(title: str, records: Sequence[dict[str, Any]], name: str, references: dict[str, float]) -> Chart | None:
    """Build the chart of a metric of metrics.jsonl over the steps, training and validation; None if it was never logged.

    The scale is logarithmic where the values are positive and span a factor of 20, as in training.png.
    """
    points_by_split: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        if isinstance(record.get(name), int | float) and math.isfinite(record[name]):
            points_by_split.setdefault(record["split"], []).append((record["step"], record[name]))
    if not points_by_split:
        return None
    values = [value for points in points_by_split.values() for _, value in points] + list(references.values())
    low, high = min(values), max(values)
    logarithmic = low > 0 and high > 20 * low
    if not logarithmic:
        margin = 0.04 * (high - low) or 0.05 * abs(high) or 1.0
        low, high = low - margin, high + margin
    y = _Axis(low, high, 172.0, 10.0, logarithmic)
    x = _Axis(0.0, float(max(1, *(step for points in points_by_split.values() for step, _ in points))), 46.0, 310.0)
    lines = [
        Line(split, [(x.at(step), y.at(value)) for step, value in points_by_split[split]], points_by_split[split][-1][1])
        for split in ("train", "validation")
        if split in points_by_split
    ]
    return Chart(title, lines, x.ticks(), y.ticks(), [Tick(y.at(value), f"{label} {value:.2f}") for label, value in references.items()])


class Cell(NamedTuple):
    """A position of a heat map; x and y count cells."""

    x: int
    y: int
    colour: str
    ink: str
    """Text colour that is readable on it."""
    value: float


class HeatMap(NamedTuple):
    """A grid of values as a heat map."""

    rows: int
    columns: int
    cells: list[Cell]
    numbered: bool
    """Whether the values fit into the cells."""


def heat_map(grid: Sequence[Sequence[float]], low: float, high: float) -> HeatMap:
    """Build a heat map of values (h, w), coloured from `low` to `high`."""
    colours = matplotlib.colormaps[_COLOURS]
    cells = []
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            share = (value - low) / (high - low) if high > low else 0.5
            cells.append(Cell(x, y, to_hex(colours(share)), "#000" if share > 0.6 else "#fff", value))
    return HeatMap(len(grid), len(grid[0]), cells, len(grid[0]) <= _MOST_NUMBERED_COLUMNS)


def colour_scale() -> str:
    """Return the heat maps' colours from low to high, as stops of a CSS gradient."""
    colours = matplotlib.colormaps[_COLOURS]
    return ", ".join(to_hex(colours(step / 8)) for step in range(9))
