"""Small line charts as inline SVG: text that can be selected, colours from the page's style, nothing to load."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minirlhf.report.healthy import Band
from minirlhf.report.markup import Html, element, joined, number, text

Point = tuple[float, float]
WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 12, 20, 38  # margins of the frame
POINTS = 450  # of all lines of a chart together; longer ones are drawn as means
COLOURS = 12  # that page.html has: .c0 to .c11


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    colour     number of a colour of the page
    marks      draw a dot at each point;  drawn  draw the line between them
    errors     a vertical bar at each point, from one number to the other
    words      what stands above each point
    dashed     for what is computed and not measured, or a second quantity of the same run
    """

    label: str
    points: Sequence[Point]
    colour: int = 0
    marks: bool = False
    drawn: bool = True
    errors: Sequence[Point] = ()
    words: Sequence[str] = ()
    dashed: bool = False


def finite(points: Sequence[Point]) -> list[Point]:
    """Without those that have no place on a chart."""
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most `most` points, each the mean of as many neighbours as the others."""
    size = -(-len(points) // most)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two others, about so many."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 2.5 * power, 5 * power, 10 * power) if step >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    found = [i * step for i in range(first, first + 3 * count) if i * step <= high + 1e-9 * step]
    return [0.0 if abs(value) < 1e-9 * step else value for value in found]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two positive numbers; of many, the powers alone.

    Where the two are so near to each other that this gives fewer than three, round numbers as on any axis.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**p for p in powers for m in (1, 2, 5) if low <= m * 10.0**p <= high]
    if len(found) < 3:
        return ticks(low, high)
    whole = [10.0**p for p in powers if low <= 10.0**p <= high]
    return found if len(found) <= 7 else whole[:: -(-len(whole) // 6)]


@dataclass(frozen=True)
class Axis:
    """One direction: values from `low` to `high` between two places on the screen."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value is, inside the frame."""
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, 1e-300))
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        """The values that are written beside it."""
        return log_ticks(self.low, self.high) if self.log else ticks(self.low, self.high)


def axis(values: Sequence[float], start: float, end: float, *, log: bool = False, band: Band | None = None) -> Axis:
    """An axis on which all values fit, and the ends of the healthy range where they are not far away."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    log = log and low > 0
    span = high - low or abs(high) or 1.0
    for edge in (band.low, band.high) if band and values and not log else ():
        if low - span <= edge <= high + span:
            low, high = min(low, edge), max(high, edge)
    if log:
        room = (high / low) ** 0.04 if high > low else 2.0
        return Axis(low / room, high * room, start, end, log=True)
    room = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
    return Axis(low if low == 0 else low - room, high + room, start, end)


def shape(line: Line, x: Axis, y: Axis, most: int) -> Html:
    """A line's path, its dots, bars and words."""
    whole = finite(line.points)
    points = [(x.place(a), y.place(b)) for a, b in thinned(whole, most)]
    kind = f"c{line.colour % COLOURS}" + (" dashed" if line.dashed else "")
    parts = []
    if line.drawn and len(points) > 1:
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        parts.append(element("path", class_=f"line {kind}", d=path))
    for (a, _), (low, high) in zip(points, line.errors, strict=False):
        path = f"M{a:.1f} {y.place(low):.1f}V{y.place(high):.1f}"
        parts.append(element("path", class_=f"line bar {kind}", d=path))
    if line.marks or len(points) == 1:
        for (a, b), (value, other) in zip(points, thinned(whole, most), strict=True):
            told = element("title", f"{line.label}: {number(value)}, {number(other)}")
            parts.append(element("circle", told, class_=f"dot {kind}", cx=f"{a:.1f}", cy=f"{b:.1f}", r=3.5))
    for (a, b), word in zip(points, line.words, strict=False):
        at_start, at_end = a < LEFT + 40, a > WIDTH - RIGHT - 40
        where = {"x": f"{a + 8 if at_start else a:.1f}", "y": f"{b + 5 if at_start else b - 9:.1f}"}
        parts.append(
            element("text", word, class_="word" + (" end" if at_end else "" if at_start else " middle"), **where)
        )
    return joined(parts)


def frame(x: Axis, y: Axis, x_label: str) -> Html:
    """Grid, numbers and the label of the horizontal axis."""
    parts = []
    for value in y.ticks():
        at = f"{y.place(value):.1f}"
        parts.append(element("path", class_="grid", d=f"M{LEFT} {at}H{WIDTH - RIGHT}"))
        parts.append(element("text", number(value), class_="end", x=LEFT - 6, y=f"{y.place(value) + 4:.1f}"))
    for value in x.ticks():
        parts.append(element("text", number(value), class_="middle", x=f"{x.place(value):.1f}", y=HEIGHT - BOTTOM + 16))
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(element("text", x_label, class_="middle label", x=middle, y=HEIGHT - 6))
    return joined(parts)


def shading(band: Band, y: Axis) -> Html:
    """The healthy range, as far as the frame shows it."""
    top, bottom = y.place(min(band.high, y.high)), y.place(max(band.low, y.low))
    size = {"x": LEFT, "y": f"{top:.1f}", "width": WIDTH - LEFT - RIGHT, "height": f"{max(0.0, bottom - top):.1f}"}
    return element("rect", class_="band", **size)


def chart(title: str, lines: Sequence[Line], *, x_label: str, band: Band | None = None, log: bool = False) -> Html:
    """An SVG of the lines; where no line has a point, a sentence that says so."""
    points = [finite(line.points) for line in lines]
    if not any(points):
        return element("p", f"{title}: no number yet.", class_="quiet")
    ends = [end for line in lines for pair in line.errors for end in pair if math.isfinite(end)]
    most = max(2, POINTS // len(lines))
    shown = [thinned(part, most) for part in points]
    x = axis([a for part in shown for a, _ in part], LEFT, WIDTH - RIGHT)
    y = axis([b for part in shown for _, b in part] + ends, HEIGHT - BOTTOM, TOP, log=log, band=band)
    parts = [element("title", title), shading(band, y) if band else "", frame(x, y, x_label)]
    parts += [shape(line, x, y, most) for line in lines]
    told = f"{title}, against {x_label}" + (f"; healthy: {band}" if band else "")
    return element("svg", *parts, viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=told)


def legend(lines: Sequence[Line]) -> Html:
    """Which colour is what; nothing where there is but one line."""
    if len(lines) < 2:
        return Html("")
    items = [
        element(
            "span",
            element("i", class_=f"c{line.colour % COLOURS}" + (" dashed" if line.dashed else "")),
            " ",
            line.label,
        )
        for line in lines
    ]
    return element("p", joined(items, " "), class_="legend")


def figure(
    title: str, lines: Sequence[Line], *, x_label: str, note: object = "", band: Band | None = None, log: bool = False
) -> Html:
    """A chart with its heading, its legend and a line about it."""
    below = element("p", text(note), class_="note") if note else ""
    caption = element("figcaption", element("h4", title), legend(lines))
    return element("figure", caption, chart(title, lines, x_label=x_label, band=band, log=log), below)
