"""The charts of a run and of its stages."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from wemmu.config.task import TASK_NAMES
from wemmu.evaluation.run_record import StageRecord
from wemmu.evaluation.scores import HEADLINE
from wemmu.report.charts import PALETTE, Line, chart, shades

SPLITS = {"test": "scenes never trained on", "composition": "pairs of colour and shape never trained on"}
TASK_COLORS = {str(task): color for task, color in zip(HEADLINE, PALETTE, strict=True)}
# (title, key -> label, factor from the chart's unit to the record's); of several keys, the first recorded one.
MACHINE = (
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
)


def score_charts(stages: Sequence[StageRecord]) -> list[Markup]:
    """Chart the share of correct answers after each evaluated stage, with 95 % intervals: one chart per split."""
    scored = {stage.name: stage.results["tasks"] for stage in stages if stage.results}
    return [
        chart(title, _scores(list(scored.values()), split), names=list(scored), top=1, form=".0%")
        for split, title in SPLITS.items()
        if scored
    ]


def _scores(stages: list[dict[str, Any]], split: str) -> list[Line]:
    lines = []
    for task, measure in HEADLINE.items():
        shares = {
            i: tasks[task][split]["measures"][measure] for i, tasks in enumerate(stages) if split in tasks.get(task, ())
        }
        values, intervals = [s["share"] for s in shares.values()], [(s["low"], s["high"]) for s in shares.values()]
        lines += [Line(list(shares), values, TASK_NAMES[task], TASK_COLORS[task], intervals)] if shares else []
    return lines


def loss_charts(stage: StageRecord) -> list[Markup]:
    """Chart loss by task, loss by noise level and gradient norm over the steps of one stage."""
    if not stage.metrics:
        return []
    keys = dict.fromkeys(key for line in stage.metrics for key in line if key.startswith("loss/"))
    levels = sorted(key for key in keys if key.startswith("loss/t_"))
    tasks = [key.removeprefix("loss/") for key in keys if key not in levels]
    by_task = [_curve(stage, f"loss/{task}", TASK_NAMES.get(task, task), TASK_COLORS.get(task)) for task in tasks]
    # `loss/t_0.25_0.50` is 0.25-0.50.
    names = ["–".join(key.removeprefix("loss/t_").split("_")) for key in levels]
    by_level = [_curve(stage, *each) for each in zip(levels, names, shades(len(levels)), strict=True)]
    clip = stage.run.stage.optimizer.clip
    return [
        chart("loss by task", by_task, log=True),
        chart("loss by noise level t (1 is noise)", by_level, log=True),
        chart("gradient norm before clipping", [_curve(stage, "grad_norm")], log=True, level=clip),
        *copy_charts(stage),
        *reward_charts(stage),
    ]


def copy_charts(stage: StageRecord) -> list[Markup]:
    """Chart the copy rate of held-out edits, if it was measured: the paper's collapse, as it happens."""
    keys = dict.fromkeys(key for line in stage.metrics for key in line if key.startswith("copy_rate/"))
    tasks = [key.removeprefix("copy_rate/") for key in keys]
    lines = [_curve(stage, f"copy_rate/{task}", TASK_NAMES[task], TASK_COLORS[task], 0.01) for task in tasks]
    return [chart("held-out edits that come out as their input, %", lines, top=100)] if lines else []


def reward_charts(stage: StageRecord) -> list[Markup]:
    """Chart rewards, lengths, ratios and times of what learns from rewards; none for other stages."""
    recorded = dict.fromkeys(key for line in stage.metrics for key in line)
    if "reward" not in recorded:
        return []
    charts = {
        "reward, and what rewards nothing": {
            key: key.removeprefix("reward/") for key in recorded if key.partition("/")[0] == "reward"
        },
        "tokens of a caption": {"length/max": "longest", "length": "mean", "length/min": "shortest"},
        "entropy of a token, nats": {"entropy": ""},
        "share of ratios that are clipped": {"clipped_high": "above", "clipped_low": "below"},
        "KL to the model that the stage began with": {"kl": ""},
        "seconds of a step": {f"time/{what}_s": what for what in ("caption", "rollout", "reward", "update")},
    }
    there = {title: {key: keys[key] for key in keys if key in recorded} for title, keys in charts.items()}
    drawn = {title: zip(keys.items(), PALETTE, strict=False) for title, keys in there.items() if keys}
    return [
        chart(title, [_curve(stage, key, label, color) for (key, label), color in curves])
        for title, curves in drawn.items()
    ]


def share_charts(stage: StageRecord) -> list[Markup]:
    """Chart the share of each task in the samples between two lines of the record, if recorded."""
    recorded = [line for line in stage.metrics if any(key.startswith("share/") for key in line)]
    steps = [line["step"] for line in recorded]
    lines = [
        Line(steps, [100 * line.get(f"share/{task}", 0.0) for line in recorded], TASK_NAMES[task], TASK_COLORS[task])
        for task in stage.run.stage.mixture
    ]
    return [chart("share of each task in the samples, %", lines, top=100, stacked=True)] if recorded else []


def machine_charts(stage: StageRecord, starts: Sequence[int]) -> list[Markup]:
    """Chart the recorded speed, memory, waiting for data and learning rate over the steps.

    starts: steps from which attempts went on, marked by dotted lines.
    """
    recorded = {key for line in stage.metrics for key in line}
    rates = {"lr": "lr", **{key: key.removesuffix("_lr") for key in sorted(recorded) if key.endswith("_lr")}}
    charts = []
    for choices in (*MACHINE, (("learning rate", rates, 1.0),)):
        title, keys, unit = next((choice for choice in choices if recorded & set(choice[1])), ("", {}, 1.0))
        colors = [(key, label, color) for (key, label), color in zip(keys.items(), PALETTE, strict=False)]
        lines = [_curve(stage, *each, unit) for each in colors if each[0] in recorded]
        charts += [chart(title, lines, marks=starts)] if lines else []
    return charts


def _curve(stage: StageRecord, key: str, label: str = "", color: str | None = None, unit: float = 1.0) -> Line:
    """Return steps and values of `key` in the lines of a record."""
    points = [(line["step"], line[key] / unit) for line in stage.metrics if key in line]
    return Line([x for x, _ in points], [y for _, y in points], label, color or PALETTE[0])
