"""Small charts as inline SVG, in the colour and font of the page; their legends are HTML.

Own code and not matplotlib: each of its charts takes 0.1 s and 13 kB more, and it knows neither the colour of the page
nor its width.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, chain
from typing import NamedTuple

from markupsafe import Markup

# Each is readable on white and on near-black.
PALETTE = ("#3b82c4", "#d9822b", "#3f9d63", "#b3589f", "#8c7a4f", "#4aa3a3", "#a04040")
# px of the drawing, and where its axes end; a page shows it 300 to 480 px wide.
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 226, 50, 362, 28, 200
# Points of a curve; of more, the lowest and the highest of each stretch are kept.
POINTS = 600


class Line(NamedTuple):
    """Points of one colour. intervals: (low, high) of each."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    color: str = PALETTE[0]
    intervals: Sequence[tuple[float, float]] = ()


def chart(
    title: str,
    lines: Sequence[Line],
    *,
    log: bool = False,
    top: float | None = None,
    level: float | None = None,
    marks: Sequence[float] = (),
    names: Sequence[str] = (),
    stacked: bool = False,
    form: str = "g",
) -> Markup:
    """Draw one small chart of curves over steps.

    log: a logarithmic axis, if all values are positive, else one from 0 to `top` or the highest value. level: a value,
    and marks: steps, that dotted lines show. names: of the places 0, 1, ... where x counts places and not steps.
    stacked: areas on each other; all lines have the same steps. form: how values are written on the axis.
    """
    lines = _stacked(lines) if stacked else [_thin(line) for line in lines]
    steps = list(range(len(names))) if names else [*chain.from_iterable(line.x for line in lines), *marks]
    values = [*chain.from_iterable((*line.y, *chain(*line.intervals)) for line in lines)]
    values += [] if level is None else [level]
    log = log and min(values, default=0) > 0
    low, high = (min(values), max(values)) if log else (min([0, *values]), top or max(values, default=0) or 1)
    margin = 0.4 if names else 0
    left, right = min(steps, default=0) - margin, max(steps, default=1) + margin
    x, y = _scale(left, right, LEFT, RIGHT), _scale(low, high, BOTTOM, TOP, math.log if log else float)
    parts = [_text(LEFT, 14, title, "title"), _text(LEFT - 5, HEIGHT - 8, "" if names else "step", "end")]
    for value in _log_ticks(low, high) if log else _ticks(low, high):
        parts.append(f'<path class="grid" d="M{LEFT} {y(value):.1f}H{RIGHT}"/>')
        parts.append(_text(LEFT - 5, y(value) + 4, f"{value:{form}}", "end"))
    for at, name in enumerate(names) if names else ((step, f"{step:g}") for step in _ticks(left, right)):
        parts.append(_text(x(at), HEIGHT - 8, name, "middle"))
    for k, line in enumerate(lines):
        # Beside each other, so that no interval hides another.
        shift = 5 * (k - (len(lines) - 1) / 2) if line.intervals else 0
        points = [(x(at) + shift, y(value)) for at, value in zip(line.x, line.y, strict=True)]
        parts += _drawn(points, line.color, stacked, bool(line.intervals))
        for (at, _), (bottom, most) in zip(points, line.intervals, strict=False):
            parts.append(f'<path d="M{at:.1f} {y(bottom):.1f}V{y(most):.1f}" stroke="{line.color}"/>')
    dotted = [f"M{x(step):.1f} {TOP}V{BOTTOM}" for step in marks]
    dotted += [] if level is None else [f"M{LEFT} {y(level):.1f}H{RIGHT}"]
    parts += [f'<path class="dotted" d="{path}"/>' for path in dotted]
    key = Markup('<span><i style="background: {}"></i>{}</span>')
    legend = [key.format(line.color, line.label) for line in lines if line.label]
    return Markup('<div class="chart"><svg viewBox="0 0 {} {}">{}</svg><div class="legend">{}</div></div>').format(
        WIDTH, HEIGHT, Markup("".join(parts)), Markup("").join(legend[::-1] if stacked else legend)
    )


def shades(count: int) -> list[str]:
    """Return colours from dark to bright, for curves that have an order."""
    return [f"hsl({220 - 150 * k / max(1, count - 1):.0f} 60% 52%)" for k in range(count)]


def _text(x: float, y: float, words: str, kind: str) -> str:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(kind, x, y, words)


def _drawn(points: list[tuple[float, float]], color: str, filled: bool, dots: bool) -> list[str]:
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    if filled:
        return [f'<path d="M{points[0][0]:.1f} {BOTTOM}L{path}V{BOTTOM}Z" fill="{color}"/>']
    # A single point has no line.
    circles = points if dots or len(points) == 1 else []
    parts = [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{color}"/>' for x, y in circles]
    return [*parts, f'<path d="M{path}" stroke="{color}"/>'] if points else parts


def _stacked(lines: Sequence[Line]) -> list[Line]:
    """Each on the sum of those before it, the highest first: those that follow are drawn over it."""
    sums = accumulate(lines, lambda below, line: line._replace(y=[a + b for a, b in zip(below.y, line.y, strict=True)]))
    return list(sums)[::-1]


def _thin(line: Line) -> Line:
    """At most `POINTS` points, all of them finite; peaks stay."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(y)]
    size = -(-2 * len(points) // POINTS)
    if size > 2:
        stretches = (points[i : i + size] for i in range(0, len(points), size))
        points = [p for s in stretches for p in sorted({f(s, key=lambda p: p[1]) for f in (min, max)})]
    return line._replace(x=[x for x, _ in points], y=[y for _, y in points])


def _scale(
    low: float, high: float, start: float, end: float, f: Callable[[float], float] = float
) -> Callable[[float], float]:
    a, b = f(low), f(high)
    return lambda value: start + (f(value) - a) / ((b - a) or 1) * (end - start)


def _ticks(low: float, high: float) -> list[float]:
    """Up to seven round numbers from `low` to `high`."""
    unit = 10 ** math.floor(math.log10((high - low) / 3 or 1))
    step = next(unit * m for m in (1, 2, 5, 10) if (high - low) / (unit * m) <= 6)
    return [k * step for k in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each decade; losses rarely span one, so between them plain ticks."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [m * 10.0**e for e in decades for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    return ticks if len(ticks) > 2 else _ticks(low, high)
