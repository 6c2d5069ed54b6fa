"""Plots as inline SVG, written by ourselves: they need no library, no script and no network.

    line_plot([Series("T=0", [Point(1, 0.7, 0.65, 0.75), Point(2, 0.5)], 0)], Axis("position"), Axis("accepted"))

Colours are not numbers here but classes (``s0``, ``s1``, ... of the page's style), so that a plot follows light and
dark mode; series also differ in their markers, for eyes and printers that do not tell colours apart. Lengths are SVG
units, which are CSS pixels where a plot has its natural width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

COLOURS = 6  # classes s0..s5 of the page's style
MARKER = 4.0  # half a marker's width
LABEL_GAP = 15.0  # between the baselines of two labels


class Point(NamedTuple):
    """A figure at ``x``; ``low`` and ``high`` are its interval, None where it has none."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    text: str = ""


class Series(NamedTuple):
    """Points joined by a line (or not), with its name at its end. ``strength`` fades a line of a family; 1 is full."""

    label: str
    points: Sequence[Point]
    colour: int
    markers: bool = True
    dashed: bool = False
    strength: float = 1.0
    joined: bool = True


@dataclass(frozen=True)
class Axis:
    """A title, the range (default: that of the data, from 0), how its ticks are written, and where they are."""

    title: str
    span: tuple[float, float] | None = None
    write: Callable[[float], str] = "{:,.10g}".format
    ticks: Sequence[float] | None = None
    log: bool = False


class Scale(NamedTuple):
    """Maps ``low``..``high`` to ``start``..``end`` on the page."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        at = math.log(value) if self.log else value
        return self.start + (at - low) / ((high - low) or 1.0) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values within the range, about ``count``."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            found = [m * 10.0**p for p in powers for m in (1, 2, 5) if self.low <= m * 10.0**p <= self.high]
            if len(found) >= 2:
                return found
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        return [index * step for index in range(first, math.floor(self.high / step + 1e-9) + 1)]


class Margins(NamedTuple):
    """Room around the data for titles and labels."""

    left: float = 46.0
    right: float = 66.0
    top: float = 30.0
    bottom: float = 42.0


def line_plot(
    series: Sequence[Series], x: Axis, y: Axis, size: tuple[float, float] = (480, 290), margins: Margins | None = None
) -> str:
    """Lines over a common x, each named at its right end; intervals stand as whiskers."""
    width, height = size
    room = margins or Margins()
    every = [point for entry in series for point in entry.points]
    across = _scale(x, [point.x for point in every], room.left, width - room.right)
    up = _scale(y, [v for p in every for v in (p.y, p.low, p.high) if v is not None], height - room.bottom, room.top)
    parts = [_y_axis(up, y, room.left, width - room.right), _x_axis(across, x, height - room.bottom)]
    dodge = min(6.0, 24.0 / max(len(series), 1))
    for index, entry in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * dodge if any(p.low is not None for p in entry.points) else 0.0
        parts.append(_line(entry, across, up, shift))
    named = [entry for entry in series if entry.label]
    ends = [up(entry.points[-1].y) for entry in named]
    for entry, at in zip(named, spread(ends, LABEL_GAP, room.top, height - room.bottom - 7), strict=True):
        parts.append(text(width - room.right + 10, at + 4, entry.label, f"name {_class(entry.colour)}"))
    return svg(parts, width, height, f"plot over {x.title}")


class Row(NamedTuple):
    """One line of a dot plot: its figure, a second, hollow one, and the value to be written at its end."""

    label: str
    colour: int
    point: Point
    hollow: Point | None
    value: str


def dot_plot(groups: Sequence[tuple[str, Sequence[Row]]], x: Axis, width: float = 520) -> str:
    """Figures with intervals in rows, gathered in named groups."""
    step, gap, room = 21.0, 13.0, Margins(158, 56, 8, 42)
    rows = [row for _, members in groups for row in members]
    height = room.top + room.bottom + len(rows) * step + len(groups) * gap
    reach = [value for row in rows for value in (row.point.y, row.point.low, row.point.high) if value is not None]
    across = _scale(x, reach, room.left, width - room.right)
    parts = [_x_axis(across, x, height - room.bottom, grid_from=room.top)]
    at = room.top
    for name, members in groups:
        at += gap
        parts.append(text(4, at + step / 2 + 4, shorten(name, 15), "strong", title=name))
        for row in members:
            parts.append(_row(row, across, at + step / 2, room.left, width - room.right))
            at += step
    return svg(parts, width, height, f"plot of {x.title}")


class Bar(NamedTuple):
    """A length from 0 on with its interval; ``colour`` None is the muted one of what is compared with."""

    label: str
    colour: int | None
    point: Point
    value: str


def bar_plot(groups: Sequence[tuple[str, str, Sequence[Bar]]], x: Axis, width: float = 520) -> str:
    """Bars in groups; each group has a name on the left and, in large type, a conclusion on the right."""
    step, gap, room = 25.0, 20.0, Margins(140, 112, 4, 42)
    height = room.top + room.bottom + sum(len(bars) * step + gap for _, _, bars in groups)
    reach = [v for _, _, bars in groups for b in bars for v in (b.point.y, b.point.high) if v is not None]
    across = _scale(x, [0.0, *reach], room.left, width - room.right)
    parts = [_x_axis(across, x, height - room.bottom, grid_from=room.top)]
    at = room.top
    for name, conclusion, bars in groups:
        at += gap
        middle = at + len(bars) * step / 2
        parts.append(text(4, middle + 4, name, "strong"))
        parts.append(text(width - 2, middle + 7, conclusion, "conclusion", "end"))
        for bar in bars:
            parts.append(_bar(bar, across, at, step, room.left))
            at += step
    return svg(parts, width, height, f"plot of {x.title}")


def svg(parts: Sequence[str], width: float, height: float, label: str) -> str:
    """The parts as one picture that fills the width it is given, with a name for screen readers."""
    shape = f'viewBox="0 0 {width:g} {height:g}" style="max-width:{width * 1.1:g}px"'
    return "\n".join([f'<svg {shape} role="img" aria-label="{escape(label)}">', *parts, "</svg>"])


def text(x: float, y: float, content: str, name: str = "", anchor: str = "start", title: str = "") -> str:
    """A line of text; ``title`` is shown under the pointer."""
    hover = f"<title>{escape(title)}</title>" if title and title != content else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{name}" text-anchor="{anchor}">{escape(content)}{hover}</text>'


def shorten(content: str, length: int) -> str:
    """At most ``length`` characters of ``content``."""
    return content if len(content) <= length else content[: length - 1] + "…"


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Positions near the ``wanted`` ones, ``gap`` apart, in the same order, within ``low``..``high`` if they fit."""
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    placed = [0.0] * len(wanted)
    before = low - gap
    for index in order:
        before = placed[index] = max(wanted[index], before + gap)
    limit = high
    for index in reversed(order):
        placed[index] = min(placed[index], limit)
        limit = placed[index] - gap
    return placed


def _scale(axis: Axis, values: Sequence[float], start: float, end: float) -> Scale:
    if axis.span:
        return Scale(*axis.span, start, end, axis.log)
    low, high = min(values), max(values)
    if axis.log:
        return Scale(low / 1.1, high * 1.1, start, end, True)
    step = _round_step((high - min(low, 0.0)) / 5 or 1.0)
    return Scale(min(low, 0.0), step * max(math.ceil(high / step - 1e-9), 1), start, end)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))


def _x_axis(scale: Scale, axis: Axis, at: float, grid_from: float | None = None) -> str:
    parts = [f'<line class="axis" x1="{scale.start:.1f}" x2="{scale.end:.1f}" y1="{at:.1f}" y2="{at:.1f}"/>']
    for value in axis.ticks or scale.ticks():
        x, top = scale(value), at if grid_from is None else grid_from
        kind = "axis" if grid_from is None else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{at + 4:.1f}"/>')
        parts.append(text(x, at + 18, axis.write(value), "tick", "middle"))
    parts.append(text((scale.start + scale.end) / 2, at + 36, axis.title, "title", "middle"))
    return "\n".join(parts)


def _y_axis(scale: Scale, axis: Axis, left: float, right: float) -> str:
    parts = [text(2, 14, axis.title, "title")]
    for value in axis.ticks or scale.ticks():
        y = scale(value)
        parts.append(f'<line class="grid" x1="{left:.1f}" x2="{right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(text(left - 7, y + 4, axis.write(value), "tick", "end"))
    return "\n".join(parts)


def _line(entry: Series, across: Scale, up: Scale, shift: float) -> str:
    path = " ".join(f"{across(point.x) + shift:.1f},{up(point.y):.1f}" for point in entry.points)
    dashes = ' stroke-dasharray="5 4"' if entry.dashed else ""
    parts = [f'<g class="{_class(entry.colour)}" opacity="{entry.strength:.2f}">']
    if entry.joined:
        parts.append(f'<polyline class="line" points="{path}"{dashes}/>')
    for point in entry.points if entry.markers else ():
        x = across(point.x) + shift
        whisker = ""
        if point.low is not None and point.high is not None:
            whisker = (
                f'<line class="whisker" x1="{x:.1f}" x2="{x:.1f}" y1="{up(point.low):.1f}" y2="{up(point.high):.1f}"/>'
            )
        parts.append(_hover(whisker + _marker(entry.colour, x, up(point.y)), point.text))
    return "\n".join([*parts, "</g>"])


def _row(row: Row, across: Scale, y: float, left: float, right: float) -> str:
    low, high = row.point.low, row.point.high
    parts = [text(left - 12, y + 4, row.label, f"tick {_class(row.colour)}", "end")]
    parts.append(text(right + 12, y + 4, row.value, "value"))
    inside = ""
    if low is not None and high is not None:
        inside = f'<line class="whisker" x1="{across(low):.1f}" x2="{across(high):.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    if row.hollow:
        inside += _hover(_marker(row.colour, across(row.hollow.y), y, hollow=True), row.hollow.text)
    inside += _hover(_marker(row.colour, across(row.point.y), y), row.point.text)
    return "\n".join([*parts, f'<g class="{_class(row.colour)}">{inside}</g>'])


def _bar(bar: Bar, across: Scale, y: float, step: float, left: float) -> str:
    middle, end = y + step / 2, across(bar.point.y)
    parts = [text(left - 8, middle + 4, bar.label, "tick", "end")]
    shape = f'<rect class="bar" x="{left:.1f}" y="{y + 3:.1f}" width="{end - left:.1f}" height="{step - 6:.1f}"/>'
    if bar.point.low is not None and bar.point.high is not None:
        start, end = across(bar.point.low), max(end, across(bar.point.high))
        shape += f'<line class="error" x1="{start:.1f}" x2="{end:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>'
    name = "muted" if bar.colour is None else _class(bar.colour)
    parts.append(f'<g class="{name}">{_hover(shape, bar.point.text)}</g>')
    return "\n".join([*parts, text(end + 6, middle + 4, bar.value, "value")])


def _marker(kind: int, x: float, y: float, hollow: bool = False) -> str:
    r, name = MARKER, "hollow" if hollow else "marker"
    if kind % 4 == 0:
        return f'<circle class="{name}" cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    corners = (
        ((-r, -r), (r, -r), (r, r), (-r, r)),
        ((0, -1.3 * r), (1.2 * r, r), (-1.2 * r, r)),
        ((0, -1.4 * r), (1.4 * r, 0), (0, 1.4 * r), (-1.4 * r, 0)),
    )[kind % 4 - 1]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="{name}" points="{points}"/>'


def _hover(shape: str, content: str) -> str:
    return f"<g><title>{escape(content)}</title>{shape}</g>" if content else shape


def _class(colour: int) -> str:
    return f"s{colour % COLOURS}"
