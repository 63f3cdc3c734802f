"""Small line charts as inline SVG: text that can be selected, colours from the page's style, nothing to load.

Every text goes through `Markup.format`, which escapes it. One chart holds all lines that are given; a line with more
points than fit is drawn as means of neighbours, and every other point is where its number is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from minirlhf.runs.health import Metric

Point = tuple[float, float]
WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 20, 38  # margins of the frame
POINTS = 450  # of all lines of a chart together; longer ones are drawn as means
COLOURS = 12  # that page.html has: .c0 to .c11
MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    colour  number of a colour of the page
    marks   draw a dot at each point;  drawn  the line between them too
    errors  a vertical bar at each point, from one number to the other
    words   to stand above each point
    dashed  for what is computed and not measured, or a second quantity of the same run
    """

    label: str
    points: Sequence[Point]
    colour: int = 0
    marks: bool = False
    drawn: bool = True
    errors: Sequence[Point] = ()
    words: Sequence[str] = ()
    dashed: bool = False

    @property
    def kind(self) -> str:
        """Its classes in the page's style."""
        return f"c{self.colour % COLOURS}" + (" dashed" if self.dashed else "")


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


def number(value: float) -> str:
    """A number in at most four digits, a whole one in all of its own, with a true minus sign."""
    whole = float(value).is_integer() and abs(value) < 1e7
    return (f"{value:,.0f}" if whole else f"{value:.4g}").replace("-", MINUS)


def short(value: float) -> str:
    """A number beside an axis, in at most eight characters: 0.25, 12,500, 2.5e−05."""
    long = value != 0 and not 1e-3 <= abs(value) < 1e6
    return f"{value:.3g}".replace("-", MINUS) if long else number(value)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between two others, about so many."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for step in (power, 2 * power, 2.5 * power, 5 * power, 10 * power) if step >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    values = [i * step for i in range(first, first + 3 * count) if i * step <= high + 1e-9 * step]
    return [0.0 if abs(value) < 1e-9 * step else value for value in values]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two positive numbers; of many, the powers alone.

    Where the two are so near to each other that this gives fewer than three, round numbers as on any axis.
    """
    powers = [10.0**p for p in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    values = [m * power for power in powers for m in (1, 2, 5) if low <= m * power <= high]
    whole = [power for power in powers if low <= power <= high]
    return ticks(low, high) if len(values) < 3 else values if len(values) <= 7 else whole[:: -(-len(whole) // 6)]


def axis(values: Sequence[float], start: float, end: float, *, log: bool = False, band: Metric | None = None) -> Axis:
    """An axis on which all values fit, and the ends of the healthy range where they are not far away."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    if log and low > 0:
        room = (high / low) ** 0.04 if high > low else 2.0
        return Axis(low / room, high * room, start, end, log=True)
    for edge in (band.low, band.high) if band else ():
        if low - span <= edge <= high + span:
            low, high = min(low, edge), max(high, edge)
    room = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
    return Axis(low if low == 0 else low - room, high + room, start, end)


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """The points that have a place on a chart; of more than `most`, means of as many neighbours each."""
    there = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    size = max(1, -(-len(there) // most))
    groups = [there[i : i + size] for i in range(0, len(there), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def shape(line: Line, values: Sequence[Point], x: Axis, y: Axis) -> Markup:
    """A line's path, its bars, dots and words, for the values that are drawn of it."""
    points = [(x.place(a), y.place(b)) for a, b in values]
    path, parts = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points), []
    if line.drawn and len(points) > 1:
        parts.append(Markup('<path class="line {}" d="{}"/>').format(line.kind, path))
    for (a, _), (low, high) in zip(points, line.errors, strict=False):
        bar = f"M{a:.1f} {y.place(low):.1f}V{y.place(high):.1f}"
        parts.append(Markup('<path class="line bar {}" d="{}"/>').format(line.kind, bar))
    if line.marks or len(points) == 1:
        dot = Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="3.5"><title>{}</title></circle>')
        for (a, b), (value, other) in zip(points, values, strict=True):
            parts.append(dot.format(line.kind, a, b, f"{line.label}: {number(value)}, {number(other)}"))
    for (a, b), word in zip(points, line.words, strict=False):
        side = "start" if a < LEFT + 40 else "end" if a > WIDTH - RIGHT - 40 else "middle"
        where = (a + 8, b + 5) if side == "start" else (a, b - 9)
        parts.append(Markup('<text class="word {}" x="{:.1f}" y="{:.1f}">{}</text>').format(side, *where, word))
    return Markup("").join(parts)


def frame(x: Axis, y: Axis, x_label: str, band: Metric | None) -> Markup:
    """The healthy range as far as it shows, grid, numbers, and the names of the axes."""
    parts, label = [], Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>')
    if band:
        top, bottom = y.place(min(band.high, y.high)), y.place(max(band.low, y.low))
        rectangle = Markup('<rect class="band" x="{}" y="{:.1f}" width="{}" height="{:.1f}"/>')
        parts.append(rectangle.format(LEFT, top, WIDTH - LEFT - RIGHT, max(0.0, bottom - top)))
    for value in y.ticks():
        line = f"M{LEFT} {y.place(value):.1f}H{WIDTH - RIGHT}"
        parts.append(Markup('<path class="grid" d="{}"/>').format(line))
        parts.append(label.format("end", LEFT - 6, y.place(value) + 4, short(value)))
    parts += [label.format("middle", x.place(value), HEIGHT - BOTTOM + 16, short(value)) for value in x.ticks()]
    parts.append(label.format("middle", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label))
    return Markup("").join([*parts, label.format("", LEFT, TOP - 7, "log scale") if y.log else ""])


def chart(title: str, lines: Sequence[Line], *, x_label: str, band: Metric | None = None, log: bool = False) -> Markup:
    """An SVG of the lines; where no line has a point, a sentence that says so."""
    values = [thinned(line.points, max(2, POINTS // len(lines))) for line in lines]
    if not any(values):
        return Markup('<p class="quiet">{}: no number yet.</p>').format(title)
    ends = [end for line in lines for pair in line.errors for end in pair if math.isfinite(end)]
    x = axis([a for part in values for a, _ in part], LEFT, WIDTH - RIGHT)
    y = axis([b for part in values for _, b in part] + ends, HEIGHT - BOTTOM, TOP, log=log, band=band)
    about = f"{title}{' on a log scale' if y.log else ''}, against {x_label}" + (f"; healthy: {band}" if band else "")
    content = [frame(x, y, x_label, band), *(shape(line, part, x, y) for line, part in zip(lines, values, strict=True))]
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}"><title>{}</title>{}</svg>')
    return svg.format(WIDTH, HEIGHT, about, title, Markup("").join(content))


def figure(title: str, lines: Sequence[Line], *, note: object = "", **settings: Any) -> dict[str, Any]:
    """A chart with its heading, its legend, where a colour stands once, and a line about it."""
    names: dict[str, str] = {}
    for line in lines:
        names.setdefault(line.kind, line.label)
    shared = len(names) < len(lines)  # by several runs, each of which its label names first
    legend = [(kind, label.rpartition(": ")[2] if shared else label) for kind, label in names.items()]
    svg = chart(title, lines, **settings)
    return {"title": title, "legend": legend if len(lines) > 1 else [], "svg": svg, "note": note}
