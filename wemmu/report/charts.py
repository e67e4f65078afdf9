"""Small charts as inline SVG, whose text and lines take the colour of the page, light or dark.

matplotlib draws them: it is there anyway (mosaicml-streaming needs it), with ticks, logarithmic axes and legends.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter, PercentFormatter, StrMethodFormatter

# Stands for the page's text colour until the SVG is written; matplotlib knows no `currentColor`.
INK = "#010203"
# Each is readable on white and on near-black.
PALETTE = ("#3b82c4", "#d9822b", "#3f9d63", "#b3589f", "#8c7a4f", "#4aa3a3")
# In inches. A page shows a panel 300 to 480 px wide, where its text is 10 to 16 px high.
PANEL_SIZE = (4.2, 2.9)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    **dict.fromkeys(("axes.grid", "axes.axisbelow"), True),
    **dict.fromkeys(("axes.linewidth", "grid.linewidth"), 0.6),
    "grid.alpha": 0.12,
    "lines.linewidth": 1.4,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.fontsize": 9,
}
DOTTED = {"color": INK, "linewidth": 0.8, "linestyle": ":"}


class Line(NamedTuple):
    """Points of one colour. intervals: (low, high) of each."""

    x: Sequence[float]
    y: Sequence[float]
    label: str = ""
    color: str = PALETTE[0]
    intervals: Sequence[tuple[float, float]] = ()


@contextmanager
def panel(charts: list[Markup], title: str) -> Iterator[Axes]:
    """One small chart, appended to `charts` as an `<svg>` element; its legend stands below, off the curves.

    Charts are one panel each, so that a page can put them side by side or, on a telephone, under each other.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=PANEL_SIZE, layout="constrained")
        axes.set_title(title)
        yield axes
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, handlelength=1.2, columnspacing=1, labelspacing=0.2)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
        plt.close(figure)
    charts.append(_inline(buffer.getvalue()))


def step_chart(
    title: str, lines: Sequence[Line], log: bool = False, level: float | None = None, marks: Sequence[int] = ()
) -> Markup:
    """Curves over steps, from zero, or with `log` on a logarithmic axis if all values are above it.

    level: a value, and `marks`: steps, that dotted lines show.
    """
    charts: list[Markup] = []
    with panel(charts, title) as axes:
        for line in lines:
            # A single point has no line.
            marker = "o" if len(line.x) == 1 else None
            axes.plot(line.x, line.y, color=line.color, label=line.label, marker=marker, markersize=3)
        if level is not None:
            axes.axhline(level, **DOTTED)
        for step in marks:
            axes.axvline(step, **DOTTED)
        axes.set_xlabel("step")
        if not log:
            axes.set_ylim(bottom=0)
            # The scale of small numbers stands beside the axis and not on the title.
            style = "sci" if axes.get_ylim()[1] < 0.01 else "plain"
            axes.ticklabel_format(axis="y", style=style, scilimits=(-2, 5))
            axes.yaxis.get_offset_text().set_size(8)
        elif all(min(line.y, default=1) > 0 for line in lines):
            # Plain numbers: losses rarely span a decade, so the decades alone would leave the axis bare.
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
    return charts[0]


def stacked_chart(title: str, lines: Sequence[Line]) -> Markup:
    """Percentages over steps, stacked to a hundred; all lines have the same steps."""
    charts: list[Markup] = []
    with panel(charts, title) as axes:
        colors, labels = [line.color for line in lines], [line.label for line in lines]
        axes.stackplot(lines[0].x, [line.y for line in lines], colors=colors, labels=labels, alpha=0.8, linewidth=0)
        axes.set(xlabel="step", ylim=(0, 100))
        axes.margins(x=0)
    return charts[0]


def share_chart(title: str, names: Sequence[str], lines: Sequence[Line]) -> Markup:
    """Shares with their intervals over names; x counts the names from 0."""
    charts: list[Markup] = []
    style = {"marker": "o", "markersize": 4, "capsize": 2, "elinewidth": 0.9}
    with panel(charts, title) as axes:
        for k, line in enumerate(lines):
            # Beside each other, so that no interval hides another.
            x = [at + 0.04 * (k - (len(lines) - 1) / 2) for at in line.x]
            bounds = [(y - low, high - y) for y, (low, high) in zip(line.y, line.intervals, strict=True)]
            errors = list(zip(*bounds, strict=True))
            axes.errorbar(x, line.y, yerr=errors, color=line.color, label=line.label, **style)
        axes.set_xticks(range(len(names)), names)
        axes.set(xlim=(-0.4, len(names) - 0.6), ylim=(-0.02, 1.04))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    return charts[0]


def shades(count: int) -> list[str]:
    """Colours from dark to bright, for curves that have an order."""
    scale = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(scale(0.3 + 0.6 * k / max(1, count - 1))) for k in range(count)]


def _inline(svg: str) -> Markup:
    """The `<svg>` element alone, with no link, metadata, size or font of its own."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'<svg([^>]*?) width="[^"]*" height="[^"]*"', r"<svg\1", svg, count=1)
    svg = re.sub(r"font-family: [^;\"]*;?", "", svg)
    return Markup(svg.replace(INK, "currentColor"))
