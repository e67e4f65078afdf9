"""The charts of a stage's own page: how fast it went, what it took of the machine, and where attempts began."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes

from wemmu.evaluation.report_charts import INK, PALETTE, TASK_COLORS, curve, panel
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


def machine_charts(stage: StageRecord, starts: Sequence[int]) -> list[str]:
    """Speed, memory, waiting for data and learning rate over the steps, as far as they were recorded.

    starts: steps from which attempts went on, marked by dotted lines.
    """
    recorded = {key for line in stage.metrics for key in line}
    chosen = [choice for choices in PANELS if (choice := next((c for c in choices if recorded & set(c[1])), None))]
    charts: list[str] = []
    for title, keys, unit in chosen:
        lines = [{k: v / unit if k in keys else v for k, v in line.items()} for line in stage.metrics]
        with panel(charts, title) as axes:
            for color, (key, label) in zip(PALETTE, keys.items(), strict=False):
                if key in recorded:
                    curve(axes, lines, key, color, label)
            _finish(axes, starts)
    return charts


def share_chart(stage: StageRecord, names: dict[str, str]) -> list[str]:
    """The share of each task in the samples between two lines of the record, if it was recorded."""
    lines = [line for line in stage.metrics if any(key.startswith("share/") for key in line)]
    charts: list[str] = []
    if lines:
        tasks = [str(task) for task in stage.run.stage.mixture]
        with panel(charts, "share of each task in the samples, %") as axes:
            axes.stackplot(
                [line["step"] for line in lines],
                [[100 * line.get(f"share/{task}", 0.0) for line in lines] for task in tasks],
                colors=[TASK_COLORS.get(task, INK) for task in tasks],
                labels=[names.get(task, task) for task in tasks],
                alpha=0.8,
                linewidth=0,
            )
            axes.set_ylim(0, 100)
            axes.margins(x=0)
            axes.set_xlabel("step")
    return charts


def _finish(axes: Axes, starts: Sequence[int]) -> None:
    axes.set_xlabel("step")
    axes.set_ylim(bottom=0)
    # The scale of small numbers stands beside the axis and not on the title.
    axes.ticklabel_format(axis="y", style="plain" if axes.get_ylim()[1] >= 0.01 else "sci", scilimits=(-2, 5))
    axes.yaxis.get_offset_text().set_size(8)
    for step in starts:
        axes.axvline(step, color=INK, linewidth=0.8, linestyle=":")


def attempt_starts(events: Sequence[dict[str, Any]], job: str) -> list[int]:
    """Steps from which attempts after the first went on."""
    begun = [event for event in events if event.get("event") == "started" and event["job"] == job]
    return [int(event.get("from_step", 0)) for event in begun[1:]]
