"""Charts: a scatter as inline SVG, drawn once for wide windows and once for phones, and bars of time as plain boxes."""

from __future__ import annotations

from collections.abc import Sequence
from math import floor, log10
from typing import NamedTuple

from sim.report.markup import Markup, join, tag

SHAPES = ("circle", "square", "triangle", "diamond", "down", "plus", "cross")
COLOURS = 7
SIZES = (("wide", 900, 430), ("narrow", 370, 340))
PARTS = ("compute", "latency", "miss", "late")


class Point(NamedTuple):
    """A mark: place, shape, colour, filled or not, text, and the row it leads to (a link only where filled)."""

    x: float
    y: float
    shape: int
    colour: int
    filled: bool
    title: str
    target: str = ""
    ring: bool = False


class Bar(NamedTuple):
    """Milliseconds of compute, latency, stall after a miss and for a late load; the floor; name and closing text."""

    name: str
    parts_ms: Sequence[float]
    floor_ms: float | None
    text: str
    chosen: bool = False


def mark(shape: int, x: float, y: float, classes: str, r: float = 5) -> Markup:
    """One marker."""
    kind = SHAPES[shape % len(SHAPES)]
    if kind == "circle":
        return tag("circle", cx=round(x, 1), cy=round(y, 1), r=r, class_=classes)
    paths = {
        "square": f"M{-r} {-r}h{2 * r}v{2 * r}h{-2 * r}z",
        "triangle": f"M0 {-r - 1}L{r + 1} {r}H{-r - 1}z",
        "diamond": f"M0 {-r - 2}L{r + 1} 0L0 {r + 2}L{-r - 1} 0z",
        "down": f"M0 {r + 1}L{r + 1} {-r}H{-r - 1}z",
        "plus": f"M-2 {-r - 1}h4v{r - 1}h{r - 1}v4h{1 - r}v{r - 1}h-4v{1 - r}h{1 - r}v-4h{r - 1}z",
        "cross": f"M{-r} {-r}L{r} {r}M{r} {-r}L{-r} {r}",
    }
    return tag("path", d=paths[kind], transform=f"translate({x:.1f} {y:.1f})", class_=classes)


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    raw = (high - low) / max(1, wanted) or 1.0
    power = 10.0 ** floor(log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = int(-(-low // step))
    return [n * step for n in range(first, int(high // step) + 1)]


def scatter(
    points: Sequence[Point], x_name: str, y_name: str, steps: Sequence[tuple[float, float]], label: str,
    diagonal: bool = False,
) -> Markup:  # fmt: skip
    """Marks over two linear axes; ``steps`` are joined as a staircase; with ``diagonal`` both axes are alike."""
    drawn = (_scatter(points, x_name, y_name, steps, label, diagonal, *size) for size in SIZES)
    return join(*drawn)


def _scatter(
    points: Sequence[Point], x_name: str, y_name: str, steps: Sequence[tuple[float, float]], label: str,
    diagonal: bool, name: str, width: int, height: int,
) -> Markup:  # fmt: skip
    left, right, top, bottom = 52, 14, 14, 46
    xs, ys = [p.x for p in points], [p.y for p in points]
    span = (max(xs) - min(xs)) or max(xs) or 1.0
    x0, x1 = max(0.0, min(xs) - 0.06 * span), max(xs) + 0.06 * span
    y0, y1 = 0.0, (max(ys) * 1.08) or 1.0
    if diagonal:
        x0 = y0 = 0.0
        x1 = y1 = max(*xs, *ys) * 1.08

    def at(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (width - left - right)
        return across, height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    parts = []
    for value in ticks(x0, x1, width // 90):
        x, _ = at(value, y0)
        parts.append(tag("line", x1=x, x2=x, y1=top, y2=height - bottom, class_="gridline"))
        parts.append(tag("text", f"{value:g}", x=x, y=height - bottom + 17, text_anchor="middle"))
    for value in ticks(y0, y1, 6):
        _, y = at(x0, value)
        parts.append(tag("line", x1=left, x2=width - right, y1=y, y2=y, class_="gridline"))
        parts.append(tag("text", f"{value:g}", x=left - 7, y=y + 4, text_anchor="end"))
    parts.append(tag("text", x_name, x=(left + width - right) / 2, y=height - 8, text_anchor="middle", class_="axis"))
    middle = (top + height - bottom) / 2
    turned = f"rotate(-90 13 {middle:g})"
    parts.append(tag("text", y_name, x=13, y=middle, text_anchor="middle", class_="axis", transform=turned))
    if diagonal:
        (ax, ay), (bx, by) = at(x0, y0), at(x1, y1)
        parts.append(tag("line", x1=ax, y1=ay, x2=bx, y2=by, class_="diagonal"))
    if steps:
        path = "M{:.1f} {:.1f}".format(*at(*steps[0]))
        path += "".join("H{:.1f}V{:.1f}".format(*at(x, y)) for x, y in steps[1:])
        path += f"H{width - right}"
        parts.append(tag("path", d=path, class_="front-line"))
    for point in points:
        x, y = at(point.x, point.y)
        classes = f"mark c{point.colour % COLOURS} {'full' if point.filled else 'open'}"
        shape = mark(point.shape, x, y, classes)
        ring = tag("circle", cx=round(x, 1), cy=round(y, 1), r=11, class_="ring") if point.ring else None
        group = tag("g", tag("title", point.title), ring, shape)
        if point.target and point.filled:
            group = tag("a", group, href=f"#{point.target}", aria_label=point.title)
        parts.append(group)
    return tag(
        "svg", *parts, viewBox=f"0 0 {width} {height}", class_=f"chart {name}", role="group", aria_label=label
    )  # fmt: skip


def legend(shapes: Sequence[str], colours: Sequence[str]) -> Markup:
    """What shapes and colours of a scatter mean."""
    items = []
    for number, text in enumerate(shapes):
        sign = tag("svg", mark(number, 9, 9, "mark ink open"), viewBox="0 0 18 18", class_="key", aria_hidden="true")
        items.append(tag("li", sign, text))
    for number, text in enumerate(colours):
        items.append(tag("li", tag("span", class_=f"swatch c{number % COLOURS}", aria_hidden="true"), text))
    return tag("ul", *items, class_="legend")


def bars(rows: Sequence[Bar], names: Sequence[str]) -> Markup:
    """Stacked bars of time per token, their floors as ticks across them; ``names`` of the parts for the legend."""
    longest = max([sum(row.parts_ms) for row in rows] + [row.floor_ms or 0 for row in rows]) or 1.0
    lines = []
    for row in rows:
        pieces = []
        for part, ms in zip(PARTS, row.parts_ms, strict=True):
            if ms > 0:
                width = f"width:{ms / longest * 100:.3f}%"
                pieces.append(tag("span", class_=f"piece {part}", style=width, title=f"{ms:.2f} ms"))
        if row.floor_ms:
            place = f"left:{row.floor_ms / longest * 100:.3f}%"
            pieces.append(tag("span", class_="floor", style=place, title=f"joint floor {row.floor_ms:.2f} ms"))
        said = ", ".join(f"{name} {ms:.2f} ms" for name, ms in zip(names, row.parts_ms, strict=True))
        said += f", joint floor {row.floor_ms:.2f} ms" if row.floor_ms else ""
        track = tag("div", *pieces, class_="track", role="img", aria_label=said)
        lines.append(
            tag("li", tag("div", row.name, class_="bar-name"), track, tag("div", row.text, class_="bar-text"),
                class_="chosen" if row.chosen else None)
        )  # fmt: skip
    keys = [tag("li", tag("span", class_=f"swatch {p}"), n) for p, n in zip(PARTS, names, strict=True)]
    keys.append(tag("li", tag("span", class_="swatch floor-key"), "joint floor: no schedule is faster"))
    return join(tag("ul", *keys, class_="legend"), tag("ul", *lines, class_="bars"))
