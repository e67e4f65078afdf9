"""The report's pictures: the first held-out requests of the newest evaluated stage, right or wrong."""

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from wemmu.config.task import Task
from wemmu.evaluation.report_record import RunRecord, Sample, StageRecord
from wemmu.sampling.grid import Row, sectioned_sheet

NAMES = {
    str(Task.T2I): "Text to picture",
    str(Task.RECONSTRUCTION): "Reconstruction",
    str(Task.UNCONDITIONAL): "No request at all",
    str(Task.EDIT): "Edit",
    str(Task.MULTI_EDIT): "Two-image edit",
    str(Task.UNDERSTANDING): "Answer, and picture restored",
}
# (task, split, number of requests) in the report; and by task on the sheet, which fills its lines with them.
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
)
ON_SHEET = {Task.T2I: 6, Task.RECONSTRUCTION: 3, Task.EDIT: 6, Task.MULTI_EDIT: 4, Task.UNDERSTANDING: 8}
SHEET_COLUMNS = 6
COMPARED = 4


def newest_with_samples(record: RunRecord) -> StageRecord | None:
    """The last stage that kept pictures of an evaluation."""
    return next((stage for stage in reversed(record.stages) if stage.samples), None)


def newest_sheets(record: RunRecord) -> list[tuple[str, str]]:
    """(stage, its newest sheet of the fixed prompts as a data URI) of each stage that has drawn one."""
    drawn = [(stage.name, sorted((stage.folder / "samples").glob("step_*.png"))) for stage in record.stages]
    return [(name, data_uri(files[-1])) for name, files in drawn if files]


def groups(stage: StageRecord) -> list[dict[str, Any]]:
    """The cards of the report, by task and split."""
    found = [
        {"title": NAMES[task], "split": split, "cards": [_card(s) for s in stage.chosen(task, split, count)]}
        for task, split, count in SHOWN
    ]
    return [group for group in found if group["cards"]]


def comparison(stages: Sequence[StageRecord]) -> dict[str, Any] | None:
    """The same captions after every stage; None unless two stages were evaluated."""
    shown = [(stage, {s.entry["number"]: s for s in stage.chosen(Task.T2I, "test", COMPARED)}) for stage in stages]
    shown = [(stage, samples) for stage, samples in shown if samples]
    if len(shown) < 2:
        return None
    common = sorted(set.intersection(*(set(samples) for _, samples in shown)))
    rows = [
        {"text": shown[-1][1][number].entry["text"], "cards": [_card(samples[number]) for _, samples in shown]}
        for number in common
    ]
    return {"stages": [stage.name for stage, _ in shown], "rows": rows}


def _card(sample: Sample) -> dict[str, Any]:
    wanted = sample.target if not sample.entry["right"] else None
    return {
        "text": _words(sample),
        "right": sample.entry["right"],
        "seen": sample.entry["seen"],
        "inputs": [data_uri(file) for file in sample.inputs],
        "output": data_uri(sample.output),
        "wanted": data_uri(wanted) if wanted else None,
    }


def data_uri(file: Path) -> str:
    """A PNG file as the address of itself."""
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def sheet(record: RunRecord) -> Image.Image:
    """The run on one page. Without an evaluation: the newest samples of the training, or a page that says so."""
    stage = newest_with_samples(record)
    if stage is None:
        drawn = [file for one in record.stages for file in sorted((one.folder / "samples").glob("step_*.png"))]
        return Image.open(drawn[-1]) if drawn else _note(f"{record.name}: no stage has drawn any samples yet")
    sections = [
        (f"{NAMES[task]}, after {stage.name}", [_row(s) for s in stage.chosen(task, "test", count)])
        for task, count in ON_SHEET.items()
    ]
    sections = [(title, rows) for title, rows in sections if rows]
    if not sections:
        return _note(f"{stage.name} was asked for none of the tasks that this sheet shows")
    return sectioned_sheet(sections, SHEET_COLUMNS)


def _row(sample: Sample) -> Row:
    pictures = [Image.open(file).convert("RGB") for file in (*sample.inputs, sample.output)]
    return Row(_words(sample), pictures, sample.entry["right"])


def _words(sample: Sample) -> str:
    """What was asked, and what was answered where words were wanted."""
    # Evaluations of earlier versions do not say.
    answer = sample.entry.get("words", "")
    return f"{sample.entry['text']}: {answer}" if answer else sample.entry["text"]


def _note(text: str) -> Image.Image:
    page = Image.new("RGB", (640, 80), "white")
    ImageDraw.Draw(page).text((20, 30), text, fill=(34, 34, 34), font=ImageFont.load_default(15))
    return page
