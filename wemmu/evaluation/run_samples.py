"""The images of a run: the first held-out requests of the newest evaluated stage, correct or not."""

from collections.abc import Sequence

from markupsafe import Markup
from PIL import Image

from wemmu.config.task import TASK_NAMES, Task
from wemmu.evaluation.run_charts import SPLITS
from wemmu.evaluation.run_record import KeptRequest, RunRecord, StageRecord
from wemmu.report import page as kit
from wemmu.report.sheet import Row, note, sectioned_sheet

# (task, split, number of requests) in the report; and per task on the sheet.
SHOWN = (
    (Task.T2I, "test", 8),
    (Task.T2I, "composition", 4),
    (Task.RECONSTRUCTION, "test", 4),
    (Task.EDIT, "test", 8),
    (Task.EDIT, "composition", 4),
    (Task.MULTI_EDIT, "test", 6),
    (Task.UNCONDITIONAL, "test", 4),
    (Task.UNDERSTANDING, "test", 8),
    (Task.UNDERSTANDING, "composition", 4),
    (Task.CAPTION, "test", 8),
    (Task.CAPTION, "composition", 4),
)
ON_SHEET = {
    Task.T2I: 6,
    Task.RECONSTRUCTION: 3,
    Task.EDIT: 6,
    Task.MULTI_EDIT: 4,
    Task.UNDERSTANDING: 8,
    Task.CAPTION: 8,
}
SHEET_COLUMNS, COMPARED = 6, 4


def _newest_evaluated(record: RunRecord) -> StageRecord | None:
    """Return the last stage that kept images of an evaluation."""
    return next((stage for stage in reversed(record.stages) if stage.samples), None)


def samples_section(record: RunRecord) -> kit.Section:
    title, newest = "Requests and outputs", _newest_evaluated(record)
    if newest is None:
        newest_sheets = {stage.name: sheets[-1] for stage in record.stages if (sheets := stage.sheets())}
        figures = [kit.Figure([kit.image(file, f"samples of {name}")], name) for name, file in newest_sheets.items()]
        words = (
            "Images for the fixed prompts of the curriculum, by the newest model of each stage. There was no "
            "evaluation, so they are not marked."
        )
        drawn: list[kit.Block] = [words, kit.Gallery("sheets", figures)]
        return kit.Section(title, drawn if figures else ["No stage has sample images or scores yet."])
    words = Markup(
        "Held-out requests, answered by the model after {}. These are the first of each kind, unselected, with "
        "failures. The exact scorer reads every image back into a scene and marks it {} correct or {} "
        "wrong."
    ).format(newest.name, kit.mark(True), kit.mark(False))
    groups = [
        kit.Gallery("figures", figures, TASK_NAMES[task], split_words(task, split))
        for task, split, count in SHOWN
        if (figures := [_figure(sample) for sample in newest.chosen(task, split, count)])
    ]
    return kit.Section(title, [words, *groups, *_comparison(record.stages)])


def split_words(task: str, split: str) -> str:
    return "any scene of the world is right" if task == Task.UNCONDITIONAL else SPLITS[split]


def _figure(sample: KeptRequest) -> kit.Figure:
    right, target = sample.entry["right"], sample.files.get("target")
    inputs = [kit.image(file, "input image") for file in sample.inputs]
    caption = Markup("{} {}").format(kit.mark(right), _words(sample) or kit.pale("no words"))
    if not right:
        small = kit.image(target, "a right answer", "small") if target else ""
        seen = f"{'would be right. ' if target else ''}The scorer saw {sample.entry['seen']}."
        caption += Markup('<div class="came pale">{}<span>{}</span></div>').format(small, seen)
    return kit.Figure([*inputs, *kit.ARROW[: len(inputs)], _output(sample)], caption)


def _output(sample: KeptRequest) -> Markup:
    return kit.image(sample.files["output"], "what came out", "right" if sample.entry["right"] else "wrong")


def _words(sample: KeptRequest) -> str:
    """Return the request, and the text answer if there is one; earlier versions did not record it."""
    answer = sample.entry.get("words", "")
    return f"{sample.entry['text']}: {answer}" if answer else sample.entry["text"]


def _comparison(stages: Sequence[StageRecord]) -> list[kit.Table]:
    """Show the same captions after every stage; empty unless two stages were evaluated."""
    shown = {stage.name: {s.entry["number"]: s for s in stage.chosen(Task.T2I, "test", COMPARED)} for stage in stages}
    shown = {name: samples for name, samples in shown.items() if samples}
    if len(shown) < 2:
        return []
    rows = [
        [_words(next(iter(shown.values()))[number]), *(_output(samples[number]) for samples in shown.values())]
        for number in sorted(set.intersection(*map(set, shown.values())))
    ]
    return [kit.Table("The same captions after every stage", ("", *shown), rows)]


def sheet(record: RunRecord) -> Image.Image:
    """Return one sheet for the run. Without an evaluation: the newest training samples, or a sheet that says so."""
    stage = _newest_evaluated(record)
    if stage is None:
        drawn = [file for one in record.stages for file in one.sheets()]
        return Image.open(drawn[-1]) if drawn else note("No stage has sample images yet")
    sections = [
        (f"{TASK_NAMES[task]}, after {stage.name}", [_row(s) for s in stage.chosen(task, "test", count)])
        for task, count in ON_SHEET.items()
    ]
    if not any(rows for _, rows in sections):
        return note(f"{stage.name} has none of the tasks that this sheet shows")
    return sectioned_sheet(sections, SHEET_COLUMNS)


def _row(sample: KeptRequest) -> Row:
    images = [Image.open(file) for file in (*sample.inputs, sample.files["output"])]
    return Row(_words(sample), images, sample.entry["right"])
