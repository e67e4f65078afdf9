"""The charts of a run and of its stages."""

from collections.abc import Sequence

from markupsafe import Markup

from wemmu.config.task import TASK_NAMES
from wemmu.evaluation.run_record import StageRecord
from wemmu.evaluation.scores import HEADLINE
from wemmu.report.charts import INK, PALETTE, Line, shades, share_chart, stacked_chart, step_chart

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
    (("learning rate", {"lr": "bridge", "dit_lr": "DiT"}, 1.0),),
)


def score_charts(stages: Sequence[StageRecord]) -> list[Markup]:
    """Chart the share of correct answers after each evaluated stage, with 95 % intervals: one chart per split."""
    scored = [(stage.name, stage.results["tasks"]) for stage in stages if stage.results]
    charts = []
    for split, title in SPLITS.items() if scored else ():
        lines = []
        for task, measure in HEADLINE.items():
            found = [(i, tasks[task][split]) for i, (_, tasks) in enumerate(scored) if split in tasks.get(task, {})]
            shares = [part["measures"][measure] for _, part in found]
            if shares:
                intervals = [(share["low"], share["high"]) for share in shares]
                values = [share["share"] for share in shares]
                lines.append(Line([i for i, _ in found], values, TASK_NAMES[task], TASK_COLORS[task], intervals))
        charts.append(share_chart(title, [name for name, _ in scored], lines))
    return charts


def loss_charts(stage: StageRecord) -> list[Markup]:
    """Chart loss by task, loss by noise level and gradient norm over the steps of one stage."""
    keys = list(dict.fromkeys(key for line in stage.metrics for key in line if key.startswith("loss/")))
    levels = sorted(key for key in keys if key.startswith("loss/t_"))
    tasks = [key.removeprefix("loss/") for key in keys if key not in levels]
    if not stage.metrics:
        return []
    by_task = [_curve(stage, f"loss/{t}", TASK_NAMES.get(t, t), TASK_COLORS.get(t, INK)) for t in tasks]
    # `loss/t_0.25_0.50` is 0.25-0.50.
    names = ["\u2013".join(key.removeprefix("loss/t_").split("_")) for key in levels]
    by_level = [_curve(stage, *each) for each in zip(levels, names, shades(len(levels)), strict=True)]
    norm, clip = [_curve(stage, "grad_norm")], stage.run.stage.optimizer.clip
    return [
        step_chart("loss by task", by_task, log=True),
        step_chart("loss by noise level t (1 is noise)", by_level, log=True),
        step_chart("gradient norm before clipping", norm, log=True, level=clip),
    ]


def share_charts(stage: StageRecord) -> list[Markup]:
    """Chart the share of each task in the samples between two lines of the record, if recorded."""
    lines = [line for line in stage.metrics if any(key.startswith("share/") for key in line)]
    steps = [line["step"] for line in lines]
    shares = [
        Line(steps, [100 * line.get(f"share/{t}", 0.0) for line in lines], TASK_NAMES[t], TASK_COLORS.get(t, INK))
        for t in stage.run.stage.mixture
    ]
    return [stacked_chart("share of each task in the samples, %", shares)] if lines else []


def machine_charts(stage: StageRecord, starts: Sequence[int]) -> list[Markup]:
    """Chart the recorded speed, memory, waiting for data and learning rate over the steps.

    starts: steps from which attempts resumed, marked by dotted lines.
    """
    recorded = {key for line in stage.metrics for key in line}
    chosen = [choice for choices in MACHINE if (choice := next((c for c in choices if recorded & set(c[1])), None))]
    return [
        step_chart(
            title,
            [
                _curve(stage, key, label, color, unit)
                for color, (key, label) in zip(PALETTE, keys.items(), strict=False)
                if key in recorded
            ],
            marks=starts,
        )
        for title, keys, unit in chosen
    ]


def _curve(stage: StageRecord, key: str, label: str = "", color: str = PALETTE[0], unit: float = 1.0) -> Line:
    """Return steps and values of `key` in the lines of a record."""
    points = [(line["step"], line[key] / unit) for line in stage.metrics if key in line]
    return Line([x for x, _ in points], [y for _, y in points], label, color)
