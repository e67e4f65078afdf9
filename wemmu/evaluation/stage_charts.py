"""The charts of a stage's own page: how fast it went, what it took of the machine, and where attempts began."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from wemmu.evaluation.report_charts import INK, PALETTE, STYLE, TASK_COLORS, curve, svg
from wemmu.evaluation.report_record import StageRecord

# (title, key -> label, what a unit of the chart is in that of the record); the first of a place that was recorded.
PANELS: tuple[tuple[tuple[str, dict[str, str], float], ...], ...] = (
    (("samples per second", {"samples_per_s": ""}, 1.0),),
    (("thousand tokens per second", {"tokens_per_s": ""}, 1e3),),
    (
        ("model FLOPs of the peak, % (MFU)", {"mfu": ""}, 0.01),
        ("model TFLOP per second", {"flops_per_s": ""}, 1e12),
    ),
    (
        ("peak GPU memory, GB", {"memory/gpu_reserved_gb": "reserved", "memory/gpu_allocated_gb": "allocated"}, 1.0),
        ("peak host memory of a rank, GB", {"memory/host_gb": ""}, 1.0),
    ),
    (("time spent waiting for data, %", {"data_wait_share": ""}, 0.01),),
    (("learning rate", {"lr": "bridge", "dit_lr": "DiT"}, 1.0),),
)


def machine_chart(stage: StageRecord, starts: Sequence[int]) -> str | None:
    """Speed, memory, waiting for data and learning rate over the steps; None if none of it was recorded.

    starts: steps from which attempts went on, marked by dotted lines.
    """
    recorded = {key for line in stage.metrics for key in line}
    panels = [choice for choices in PANELS if (choice := next((c for c in choices if recorded & set(c[1])), None))]
    if not panels:
        return None
    rows = -(-len(panels) // 3)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, 3, figsize=(9, 2.3 * rows), layout="constrained", squeeze=False)
        for panel in axes.flat[len(panels) :]:
            panel.set_axis_off()
        for panel, (title, keys, unit) in zip(axes.flat, panels, strict=False):
            panel.set_title(title)
            lines = [{k: v / unit if k in keys else v for k, v in line.items()} for line in stage.metrics]
            for color, (key, label) in zip(PALETTE, keys.items(), strict=False):
                if key in recorded:
                    curve(panel, lines, key, color, label)
            _finish(panel, starts)
        return svg(figure)


def share_chart(stage: StageRecord, names: dict[str, str]) -> str | None:
    """The share of each task in the samples between two lines of the record; None if it was not recorded."""
    lines = [line for line in stage.metrics if any(key.startswith("share/") for key in line)]
    if not lines:
        return None
    tasks = [str(task) for task in stage.run.stage.mixture]
    with plt.rc_context(STYLE):
        figure, panel = plt.subplots(figsize=(9, 1.6), layout="constrained")
        panel.stackplot(
            [line["step"] for line in lines],
            [[100 * line.get(f"share/{task}", 0.0) for line in lines] for task in tasks],
            colors=[TASK_COLORS.get(task, INK) for task in tasks],
            labels=[names.get(task, task) for task in tasks],
            alpha=0.8,
            linewidth=0,
        )
        panel.set_title("share of each task in the samples, %")
        panel.set_ylim(0, 100)
        panel.margins(x=0)
        panel.set_xlabel("step")
        figure.legend(loc="outside right center")
        return svg(figure)


def _finish(panel: Axes, starts: Sequence[int]) -> None:
    panel.set_xlabel("step")
    panel.set_ylim(bottom=0)
    # The scale of small numbers stands beside the axis and not on the title.
    panel.ticklabel_format(axis="y", style="plain" if panel.get_ylim()[1] >= 0.01 else "sci", scilimits=(-2, 5))
    panel.yaxis.get_offset_text().set_size(8)
    for step in starts:
        panel.axvline(step, color=INK, linewidth=0.8, linestyle=":")
    if panel.get_legend_handles_labels()[0]:
        panel.legend(handlelength=1, labelspacing=0.2, borderaxespad=0.2)


def attempt_starts(events: Sequence[dict[str, Any]], job: str) -> list[int]:
    """Steps from which attempts after the first went on."""
    begun = [event for event in events if event.get("event") == "started" and event["job"] == job]
    return [int(event.get("from_step", 0)) for event in begun[1:]]
