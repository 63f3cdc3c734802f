"""Small line charts: where everything stands and what it is called. `page.html` draws them as inline SVG.

One chart holds all lines that are given; a line with more points than fit is drawn as means of neighbours, and every
other point is where its number is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from markupsafe import Markup

from minirlhf.runs.health import Metric

Point = tuple[float, float]
Block = dict[str, Any]
LEFT, RIGHT, TOP, BOTTOM = 58, 348, 20, 192  # edges of the frame
POINTS = 450  # of all lines of a chart together; longer ones are drawn as means
COLOURS = 12  # that page.html has: .c0 to .c11
MINUS = "\N{MINUS SIGN}"
ANY = Metric()


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    colour  number of a colour of the page
    dots    draw one at each point, named by `prefix` and label
    errors  a vertical bar at each point, from one number to the other
    words   to stand beside each point
    dashed  for what is computed and not measured, or a second quantity of the same run
    """

    label: str
    points: Sequence[Point]
    colour: int = 0
    dots: bool = True
    errors: Sequence[Point] = ()
    words: Sequence[str] = ()
    dashed: bool = False
    prefix: str = ""

    @property
    def kind(self) -> str:
        """Its classes in the page's style."""
        return f"c{self.colour % COLOURS}" + " dashed" * self.dashed

    @property
    def folded(self) -> bool:
        """True where the line would double back: its dots stand alone."""
        return list(self.points) != sorted(self.points, key=lambda point: point[0])

    def path(self, x: Axis, y: Axis) -> Markup:
        """The line from point to point, and its bars."""
        places = [f"{x.place(a)} {y.place(b)}" for a, b in self.points]
        line = "" if self.folded or len(places) < 2 else "M" + "L".join(places)
        bars = zip(self.points, self.errors, strict=False)
        return Markup(line + "".join(f"M{x.place(a)} {y.place(b)}V{y.place(c)}" for (a, _), (b, c) in bars))

    def places(self, x: Axis, y: Axis) -> list[tuple[float, float, str]]:
        """The place of each dot, and its numbers."""
        shown = self.points if self.dots or self.folded or len(self.points) == 1 else []
        name = f"{self.prefix}{self.label}"
        return [(x.place(a), y.place(b), f"{name}: {number(a)}, {number(b)}") for a, b in shown]


class Axis:
    """One direction, from `start` to `end` on the screen.

    All values fit, and the ends of the healthy range where they are not far away. Where the range is `log` and all
    values are above 0, the axis is logarithmic: `low` and `high` are logarithms.
    """

    def __init__(self, values: Sequence[float], start: float, end: float, band: Metric = ANY) -> None:
        low, high = min(values), max(values)
        self.start, self.end, self.log = start, end, band.log and low > 0
        span = high - low or abs(high) or 1.0
        for edge in () if self.log else (band.low, band.high):
            if low - span <= edge <= high + span:
                low, high = min(low, edge), max(high, edge)
        low, high = self.scaled(low), self.scaled(high)
        room = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
        self.low, self.high = low if low == 0 else low - room, high + room

    def scaled(self, value: float) -> float:
        """The value, or its logarithm."""
        return math.log10(max(value, 1e-300)) if self.log else value

    def place(self, value: float) -> float:
        """Place of a value inside the frame."""
        return round(float(np.interp(self.scaled(value), (self.low, self.high), (self.start, self.end))), 1)

    def ticks(self) -> list[tuple[float, str]]:
        """The places of round numbers, and the numbers."""
        values = log_ticks(10**self.low, 10**self.high) if self.log else ticks(self.low, self.high)
        return [(self.place(value), short(value)) for value in values]


def number(value: float) -> str:
    """A number in at most four digits, a whole one in all of its own, with a true minus sign."""
    whole = float(value).is_integer() and abs(value) < 1e7
    return (f"{value:,.0f}" if whole else f"{value:.4g}").replace("-", MINUS)


def short(value: float) -> str:
    """A number beside an axis, in at most eight characters: 0.25, 12,500, 2.5e−05."""
    long = value != 0 and not 1e-3 <= abs(value) < 1e6
    return f"{value:.3g}".replace("-", MINUS) if long else number(value)


def ticks(low: float, high: float) -> list[float]:
    """Round numbers between two others, about five."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(size * power for size in (1, 2, 2.5, 5, 10) if size * power >= rough * (1 - 1e-9))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between two positive numbers; of many, the powers alone.

    Where the two are so near to each other that this gives fewer than three, round numbers as on any axis.
    """
    powers = [10.0**p for p in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    values = [m * power for power in powers for m in (1, 2, 5) if low <= m * power <= high]
    whole = [power for power in powers if low <= power <= high]
    return ticks(low, high) if len(values) < 3 else values if len(values) <= 7 else whole[:: -(-len(whole) // 6)]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """The points that have a place on a chart; of more than `most`, means of as many neighbours each."""
    numbers = np.array(points, dtype=float).reshape(-1, 2)
    numbers = numbers[np.isfinite(numbers).all(axis=1)]
    size = max(1, -(-len(numbers) // most))
    return [tuple(numbers[i : i + size].mean(axis=0).tolist()) for i in range(0, len(numbers), size)]


def chart(title: str, lines: Sequence[Line], x_label: str, *, band: Metric = ANY, note: Sequence[object] = ()) -> Block:
    """A chart of the lines that have a point, and what stands below it."""
    most = max(2, POINTS // max(1, len(lines)))
    lines = [replace(line, points=points) for line in lines if (points := thinned(line.points, most))]
    if not lines:
        return {"title": title}
    ends = [end for line in lines for pair in line.errors for end in pair if math.isfinite(end)]
    x = Axis([a for line in lines for a, _ in line.points], LEFT, RIGHT)
    y = Axis([b for line in lines for _, b in line.points] + ends, BOTTOM, TOP, band)
    about = f"{title}{' on a log scale' * y.log}, against {x_label}" + (f"; healthy: {band}" if str(band) else "")
    shaded = f"M{LEFT} {y.place(band.high)}H{RIGHT}V{y.place(band.low)}H{LEFT}" if str(band) else ""
    part = {"title": title, "about": about, "shaded": shaded, "x_label": x_label, "note": note}
    return part | {"x": x, "y": y, "lines": lines}
