"""The report's charts, as inline SVG whose text and lines take the colour of the page, light or dark."""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from wemmu.evaluation.report_record import StageRecord
from wemmu.evaluation.scores import HEADLINE

SPLITS = {"test": "scenes never trained on", "composition": "pairs of colour and shape never trained on"}
# Stands for the page's text colour until the SVG is written; matplotlib knows no `currentColor`.
INK = "#010203"
# Each is readable on white and on near-black.
PALETTE = ("#3b82c4", "#d9822b", "#3f9d63", "#b3589f", "#8c7a4f", "#4aa3a3")
TASK_COLORS = {str(task): color for task, color in zip(HEADLINE, PALETTE, strict=True)}
# In inches. A page shows a panel 300 to 480 px wide, where its text is 10 to 16 px high.
PANEL_SIZE = (4.2, 2.9)
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.4,
}


@contextmanager
def panel(charts: list[str], title: str) -> Iterator[Axes]:
    """One small chart, appended to `charts` as an `<svg>` element; its legend stands below, off the curves.

    Charts are one panel each, so that a page can put them side by side or, on a telephone, under each other.
    """
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=PANEL_SIZE, layout="constrained")
        axes.set_title(title)
        yield axes
        if axes.get_legend_handles_labels()[0]:
            figure.legend(loc="outside lower center", ncols=2, handlelength=1.2, columnspacing=1, labelspacing=0.2)
        charts.append(svg(figure))


def score_charts(stages: Sequence[StageRecord], names: dict[str, str]) -> list[str]:
    """Share of right answers after each evaluated stage, with 95 % intervals: one chart for each split."""
    scored = [stage for stage in stages if stage.results]
    charts: list[str] = []
    for split, title in SPLITS.items() if scored else ():
        with panel(charts, title) as axes:
            for k, (task, measure) in enumerate(HEADLINE.items()):
                _score_line(axes, scored, task, split, measure, TASK_COLORS[task], names[task], 0.04 * (k - 2))
            axes.set_xticks(range(len(scored)), [stage.name for stage in scored])
            axes.set_xlim(-0.4, len(scored) - 0.6)
            axes.set_ylim(-0.02, 1.04)
            axes.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
    return charts


def _score_line(
    panel: Axes, stages: list[StageRecord], task: str, split: str, measure: str, color: str, label: str, shift: float
) -> None:
    points = [
        (i + shift, part["measures"][measure])
        for i, stage in enumerate(stages)
        if (part := (stage.results or {})["tasks"].get(task, {}).get(split))
    ]
    if not points:
        return
    x = [at for at, _ in points]
    y = [share["share"] for _, share in points]
    # The interval of a share of 0 or 1 lies on one side only.
    errors = [[s["share"] - s["low"] for _, s in points], [s["high"] - s["share"] for _, s in points]]
    panel.errorbar(x, y, yerr=errors, color=color, label=label, marker="o", markersize=4, capsize=2, elinewidth=0.9)


def loss_charts(stage: StageRecord, names: dict[str, str]) -> list[str]:
    """Loss by task, loss by noise level and gradient norm over the steps of one stage."""
    lines = stage.metrics
    if not lines:
        return []
    keys = list(dict.fromkeys(key for line in lines for key in line if key.startswith("loss/")))
    levels = sorted(key for key in keys if key.startswith("loss/t_"))
    shades = matplotlib.colormaps["viridis"]
    charts: list[str] = []
    with panel(charts, "loss by task") as axes:
        for key in keys:
            task = key.removeprefix("loss/")
            if key not in levels:
                curve(axes, lines, key, TASK_COLORS.get(task, INK), names.get(task, task))
        _finish(axes)
    with panel(charts, "loss by noise level t (1 is noise)") as axes:
        for k, key in enumerate(levels):
            curve(axes, lines, key, shades(0.3 + 0.6 * k / max(1, len(levels) - 1)), _level(key))
        _finish(axes)
    with panel(charts, "gradient norm before clipping") as axes:
        curve(axes, lines, "grad_norm", PALETTE[0], "")
        axes.axhline(stage.run.stage.optimizer.clip, color=INK, linewidth=0.8, linestyle=":")
        _finish(axes)
    return charts


def _finish(axes: Axes) -> None:
    axes.set_xlabel("step")
    if all(min(line.get_ydata()) > 0 for line in axes.lines):
        _log_scale(axes)


def curve(panel: Axes, lines: list[dict[str, Any]], key: str, color: Any, label: str) -> None:
    """Draw what the lines of a record say of `key` over their steps."""
    points = [(line["step"], line[key]) for line in lines if key in line]
    # A task that the log has met once is still worth its point.
    marker = "o" if len(points) == 1 else None
    panel.plot([x for x, _ in points], [y for _, y in points], color=color, label=label, marker=marker, markersize=3)


def _log_scale(panel: Axes) -> None:
    """Logarithmic, with plain numbers: losses rarely span a decade, so the decades alone would leave the axis bare."""
    panel.set_yscale("log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    panel.yaxis.set_minor_formatter(NullFormatter())


def _level(key: str) -> str:
    """`loss/t_0.25_0.50` -> `0.25-0.50`."""
    return "\u2013".join(key.removeprefix("loss/t_").split("_"))


def svg(figure: Figure) -> str:
    """The figure as an `<svg>` element with no link, fixed size or metadata in it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    plt.close(figure)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # The page's own width and font.
    text = re.sub(r'<svg([^>]*?) width="[^"]*" height="[^"]*"', r"<svg\1", text, count=1)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    return text.replace(INK, "currentColor")
