"""The report's charts, as inline SVG whose text and lines take the colour of the page, light or dark."""

import io
import re
from collections.abc import Sequence
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


def score_chart(stages: Sequence[StageRecord], names: dict[str, str]) -> str | None:
    """Share of right answers after each evaluated stage, with 95 % intervals: one panel for each split."""
    scored = [stage for stage in stages if stage.results]
    if not scored:
        return None
    with plt.rc_context(STYLE):
        figure, panels = plt.subplots(1, 2, figsize=(9, 2.9), sharey=True, layout="constrained")
        for panel, (split, title) in zip(panels, SPLITS.items(), strict=True):
            panel.set_title(title)
            for k, (task, measure) in enumerate(HEADLINE.items()):
                _score_line(panel, scored, task, split, measure, TASK_COLORS[task], names[task], 0.04 * (k - 2))
            panel.set_xticks(range(len(scored)), [stage.name for stage in scored])
            panel.set_xlim(-0.4, len(scored) - 0.6)
            panel.set_ylim(-0.02, 1.04)
            panel.yaxis.set_major_formatter(lambda y, _: f"{y:.0%}")
        handles = {label: h for panel in panels for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
        figure.legend(handles.values(), handles.keys(), loc="outside right center")
        return svg(figure)


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


def loss_chart(stage: StageRecord, names: dict[str, str]) -> str | None:
    """Loss by task, loss by noise level and gradient norm over the steps of one stage."""
    lines = stage.metrics
    if not lines:
        return None
    keys = list(dict.fromkeys(key for line in lines for key in line if key.startswith("loss/")))
    levels = sorted(key for key in keys if key.startswith("loss/t_"))
    tasks = [key for key in keys if key not in levels]
    with plt.rc_context(STYLE):
        figure, (by_task, by_level, norm) = plt.subplots(1, 3, figsize=(9, 2.5), layout="constrained")
        by_task.set_title("loss by task")
        for key in tasks:
            task = key.removeprefix("loss/")
            curve(by_task, lines, key, TASK_COLORS.get(task, INK), names.get(task, task))
        by_level.set_title("loss by noise level t (1 is noise)")
        shades = matplotlib.colormaps["viridis"]
        for k, key in enumerate(levels):
            curve(by_level, lines, key, shades(0.3 + 0.6 * k / max(1, len(levels) - 1)), _level(key))
        norm.set_title("gradient norm before clipping")
        curve(norm, lines, "grad_norm", PALETTE[0], "")
        norm.axhline(stage.run.stage.optimizer.clip, color=INK, linewidth=0.8, linestyle=":")
        for panel in (by_task, by_level, norm):
            panel.set_xlabel("step")
            if all(min(line.get_ydata()) > 0 for line in panel.lines):
                _log_scale(panel)
            if panel.get_legend_handles_labels()[0]:
                panel.legend(handlelength=1, labelspacing=0.2, borderaxespad=0.2)
        return svg(figure)


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
