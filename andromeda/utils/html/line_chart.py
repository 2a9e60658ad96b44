"""Charts of lines as SVG: scales from values to pixels, ticks of the axes, labels."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from andromeda.utils.formatting import format_number, format_si
from andromeda.utils.html.elements import el, join

FACTORS = ((1, 2, 3, 4, 5, 6, 7, 8, 9), (1, 2, 5), (1, 3), (1,))
"""Which multiples of powers of ten stand at a logarithmic axis."""

STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True)
class Scale:
    """Maps values in [low, high] to pixels in [begin, end], linearly or by the logarithm. Values below `low` are at it if logarithmic."""

    low: float
    high: float
    begin: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        f: Callable[[float], float] = math.log if self.log else float
        share = (f(max(value, self.low) if self.log else value) - f(self.low)) / (f(self.high) - f(self.low))
        return self.begin + share * (self.end - self.begin)

    def ticks(self, count: int) -> list[float]:
        """About `count` round values within [low, high], ascending."""
        return log_ticks(self.low, self.high, count) if self.log else linear_ticks(self.low, self.high, count)


def spread(values: Iterable[float], *, log: bool = False, zero: bool = False) -> tuple[float, float]:
    """Ends of an axis for `values`, with a margin of 5 % and never equal. log: a factor of 1.1 as margin, values of at most 0 are left out.
    zero: begin at 0. Without finite values (0, 1), or (0.1, 1) if logarithmic."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not known:
        return (0.1, 1.0) if log else (0.0, 1.0)
    low, high = min(known), max(known)
    if log:
        return (low / 1.1, high * 1.1) if high / low > 1.05 else (low / 2, high * 2)
    low = min(low, 0.0) if zero else low
    low, high = apart(low, high)
    room = 0.05 * (high - low)
    return (low if zero and low == 0 else low - room), high + room


def apart(low: float, high: float) -> tuple[float, float]:
    """The same ends, or wider ones where they are too close to be told apart."""
    size = max(abs(low), abs(high))
    by = 0.0 if high - low > 1e-9 * size else 0.1 * size or 1.0
    return low - by, high + by


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s for s in STEPS if s * power >= raw * 0.7) * power
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten (or of a power of ten, where they are many); between few of them also some multiples.

    Over less than a power of ten, where that leaves fewer than three, those of a linear axis.
    """
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    found = [[f * 10.0**p for p in range(first, last + 1) for f in factors if low <= f * 10.0**p <= high] for factors in FACTORS]
    # The finest that is not too many; the coarsest of all is thinned where a scale spans very many powers.
    ticks = next((ticks for ticks in found if len(ticks) <= count + 1), found[-1])
    if len(ticks) < 3 and high < 10 * low:
        return linear_ticks(low, high, count)
    return ticks if len(ticks) <= count + 1 else ticks[:: math.ceil(len(ticks) / count)]


Point = tuple[float, float]

MOST = 400
"""Points of a drawn line; more are put together."""
MOST_DOTS = 60
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 8, 34
"""Margins in pixels: room for the figures of the axes."""


@dataclass(frozen=True)
class Series:
    """A line. color: number of one of the page's colors, from 1."""

    name: str
    points: Sequence[Point]
    color: int = 1
    dots: bool = False
    """Show each point, where they are few."""
    band: Sequence[tuple[float, float, float]] = ()
    """(x, low, high) around the line."""


@dataclass(frozen=True)
class Axis:
    """What an axis shows."""

    label: str
    log: bool = False
    zero: bool = False
    """Begin at 0."""
    show: Callable[[float], str] = format_si
    """A figure at the axis."""
    ends: tuple[float, float] | None = None
    """Fixed ends instead of the data's."""
    ticks: Sequence[float] = ()
    """Fixed figures instead of round ones."""


@dataclass(frozen=True)
class ReferenceLine:
    """A level to compare with."""

    name: str
    value: float


@dataclass(frozen=True)
class Plot:
    """Size and scales of one drawing."""

    width: int
    height: int
    x: Scale
    y: Scale


def line_chart(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    rules: Sequence[ReferenceLine] = (),
    marks: Sequence[float] = (),
    note: str = "",
    wide: bool = False,
    narrow: bool = False,
) -> Markup:
    """A figure. rules: levels to compare with. marks: places on the x axis that something happened at. wide: as wide as the page;
    narrow: four side by side on a desktop.
    """
    known = [thinned(clean(s, log_x=x.log, log_y=y.log)) for s in series]
    known = [s for s in known if s.points]
    sizes = ((380, 232, "narrow"), (1080, 300, "broad")) if wide else ((290, 200, "") if narrow else (380, 232, ""),)
    drawn = [_draw(title, known, x, y, rules, marks, *size) for size in sizes]
    keys = [el("span", el("i", class_=f"key c{s.color}"), s.name, class_="legend") for s in known] if len(known) > 1 else []
    caption = el("figcaption", el("b", title), el("span", y.label, class_="unit") if y.label else None, keys)
    return el("figure", caption, drawn, el("p", note, class_="note") if note else None, class_="chart wide" if wide else "chart")


def clean(series: Series, *, log_x: bool = False, log_y: bool = False) -> Series:
    """Without points that an axis cannot show."""
    points = [(a, b) for a, b in series.points if math.isfinite(a) and math.isfinite(b) and (a > 0 or not log_x) and (b > 0 or not log_y)]
    return Series(series.name, points, series.color, series.dots, series.band)


def thinned(series: Series, most: int = MOST) -> Series:
    """At most `most` points: means of neighbors, with a band from their least to their greatest."""
    points = series.points
    if len(points) <= most:
        return series
    size = math.ceil(len(points) / most)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    means = [(sum(a for a, _ in g) / len(g), sum(b for _, b in g) / len(g)) for g in groups]
    band = [(mean[0], min(b for _, b in g), max(b for _, b in g)) for mean, g in zip(means, groups, strict=True)]
    return Series(series.name, means, series.color, series.dots, series.band or band)


def _draw(
    title: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    rules: Sequence[ReferenceLine],
    marks: Sequence[float],
    width: int,
    height: int,
    kind: str,
) -> Markup:
    plot = _plot(series, x, y, rules, width, height)
    chart = {
        "x": [plot.x.low, plot.x.high, plot.x.begin, plot.x.end, plot.x.log],
        "y": [plot.y.low, plot.y.high, plot.y.begin, plot.y.end, plot.y.log],
        "label": x.label,
        "series": [
            {
                "name": s.name,
                "color": s.color,
                "points": [[_round(a), _round(b)] for a, b in s.points],
                "shown": [[x.show(a), _value_text(y, b)] for a, b in s.points],
            }
            for s in series
        ],
    }
    return el(
        "svg",
        _frame(plot, x, y),
        [_rule(rule, plot, series) for rule in rules],
        [el("path", class_="mark", d=f"M{plot.x(m):.1f},{plot.y.end}V{plot.y.begin}") for m in marks],
        [_line(s, plot) for s in series],
        el("g", class_="cursor"),
        class_=kind or None,
        viewBox=f"0 0 {width} {height}",
        role="img",
        aria_label=_summary(title, series, x),
        tabindex="0",
        data_chart=json.dumps(chart, separators=(",", ":")),
    )


def _value_text(axis: Axis, value: float) -> str:
    return format_number(value) if axis.show is format_si else axis.show(value)


def _plot(series: Sequence[Series], x: Axis, y: Axis, rules: Sequence[ReferenceLine], width: int, height: int) -> Plot:
    across = x.ends or spread((a for s in series for a, _ in s.points), log=x.log)
    if not x.ends and not x.log and series:
        across = (min(a for s in series for a, _ in s.points), max(a for s in series for a, _ in s.points))
        across = apart(*across)
    heights = [b for s in series for b in _heights(s)] + [rule.value for rule in rules]
    up = y.ends or spread(heights, log=y.log, zero=y.zero)
    return Plot(width, height, Scale(*across, LEFT, width - RIGHT, x.log), Scale(*up, height - BOTTOM, TOP, y.log))


def _heights(series: Series) -> list[float]:
    """The figures that the axis must show: a steep beginning of a long line may leave the chart at the top."""
    skipped = len(series.points) // 50 if len(series.points) >= 100 else 0
    values = [b for _, b in series.points[skipped:]]
    return values + [end for _, low, high in series.band[skipped:] for end in (low, high)]


def _frame(plot: Plot, x: Axis, y: Axis) -> Markup:
    """Grid lines, figures and the name of the x axis."""
    across = x.ticks or plot.x.ticks(plot.width // 75)
    parts: list[Markup] = []
    for tick in y.ticks or plot.y.ticks(5):
        at = plot.y(tick)
        parts.append(el("path", class_="grid", d=f"M{plot.x.begin},{at:.1f}H{plot.x.end}"))
        parts.append(el("text", y.show(tick), x=plot.x.begin - 6, y=f"{at + 3.5:.1f}", class_="tick end"))
    parts += [el("text", x.show(tick), x=f"{plot.x(tick):.1f}", y=plot.y.begin + 14, class_="tick middle") for tick in across]
    parts.append(el("path", class_="axis", d=f"M{plot.x.begin},{plot.y.begin}H{plot.x.end}"))
    parts.append(el("text", x.label, x=plot.x.end, y=plot.height - 4, class_="tick end"))
    return join(parts)


def _rule(rule: ReferenceLine, plot: Plot, series: Sequence[Series]) -> Markup:
    """A dashed line, named at the end that the lines are farther from."""
    at, third = plot.y(rule.value), (plot.x.end - plot.x.begin) / 3
    places = [(plot.x(a), plot.y(b)) for s in series for a, b in s.points]
    left = min((abs(b - at + 8) for a, b in places if a < plot.x.begin + third), default=99.0)
    right = min((abs(b - at + 8) for a, b in places if a > plot.x.end - third), default=99.0)
    where = (plot.x.begin + 4, "tick halo") if left > right else (plot.x.end, "tick end halo")
    label = el("text", rule.name, x=where[0], y=f"{at - 4:.1f}", class_=where[1])
    return join(el("path", class_="rule", d=f"M{plot.x.begin},{at:.1f}H{plot.x.end}"), label)


def _line(series: Series, plot: Plot) -> Markup:
    places = [(plot.x(a), max(plot.y(b), plot.y.end - 20)) for a, b in series.points]
    parts: list[Markup] = []
    if series.band:
        above = [f"{plot.x(a):.1f},{_inside(high, plot):.1f}" for a, _, high in series.band]
        below = [f"{plot.x(a):.1f},{_inside(low, plot):.1f}" for a, low, _ in reversed(series.band)]
        parts.append(el("path", class_=f"band c{series.color}", d="M" + "L".join([*above, *below]) + "Z"))
    # Above the frame nothing is drawn: a line that begins higher enters from there.
    box = f"inset({plot.y.end - 4}px 0 0 0)"
    shape = "M" + "L".join(f"{a:.1f},{b:.1f}" for a, b in places)
    parts.append(el("path", class_=f"line c{series.color}", d=shape, style=f"clip-path:{box}" if min(b for _, b in places) < TOP else None))
    if (series.dots and len(places) <= MOST_DOTS) or len(places) == 1:
        parts += [el("circle", class_=f"dot c{series.color}", cx=f"{a:.1f}", cy=f"{b:.1f}", r=2.6) for a, b in places]
    return join(parts)


def _inside(value: float, plot: Plot) -> float:
    """Its pixel, or that of the frame's nearer edge."""
    return min(plot.y.begin, max(plot.y.end, plot.y(value)))


def _summary(title: str, series: Sequence[Series], x: Axis) -> str:
    """The chart in a sentence, for screen readers."""

    def at(point: Point) -> str:
        return f"{format_number(point[1])} at {x.show(point[0])}"

    ends = [f"{s.name} from {at(s.points[0])} to {at(s.points[-1])}" for s in series]
    return f"{title} by {x.label}: {'; '.join(ends) or 'nothing yet'}."


def _round(value: float) -> float:
    return float(f"{value:.6g}")
