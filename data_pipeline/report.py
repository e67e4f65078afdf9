"""The report of a data set: report.json, report.txt and report.html in its directory."""

from collections.abc import Callable, Iterable
from itertools import groupby, islice, pairwise
from operator import attrgetter

from markupsafe import Markup

from data_pipeline.contents import records, shard_files
from data_pipeline.ledger import CAPTION_EDGES, SIDE_EDGES, Ledger
from data_pipeline.plan import Settings
from data_pipeline.records import Rejection
from data_pipeline.report_record import (
    HTML_FILE,
    JSON_FILE,
    TEXT_FILE,
    ReasonCount,
    Report,
    StageSteps,
    in_order,
    report_of,
    samples_at,
)
from wemmu.config import Curriculum
from wemmu.config.files import replace_text
from wemmu.config.shards import SETTINGS_FILE, DataSet, StoredRecord, Stream
from wemmu.config.task import TASK_NAMES
from wemmu.readable import human, percent
from wemmu.report import page as kit
from wemmu.report import text

# Records shown of each stream, and of all together: with hundreds of buckets the page must still open.
SHOWN, SHOWN_IN_ALL = 8, 400
# Characters of a prompt or an answer; under the mouse there are more.
WORDS = 200


def write_report(curriculum: Curriculum, dataset: DataSet) -> str:
    """Write the report of a complete data set, the JSON last; returns its text."""
    root = curriculum.data.shards
    report = report_of(curriculum, dataset, Ledger(root).entries(Settings.load(root / SETTINGS_FILE).parts))
    words = as_text(report)
    replace_text(root / TEXT_FILE, words)
    replace_text(root / HTML_FILE, page(report, dataset))
    report.save(root / JSON_FILE)
    return words


def as_text(report: Report) -> str:
    return text.as_text(_page(report, []))


def page(report: Report, dataset: DataSet) -> str:
    """Return the HTML of a report, with the first records of every stream."""
    return kit.html(_page(report, [_samples(report, dataset)]))


def _page(report: Report, more: list[kit.Section]) -> kit.Page:
    facts = [
        (number(report.read), "records read"),
        (number(report.kept), "kept"),
        (number(report.left_out(damaged=True)), "damaged"),
        (number(report.left_out(damaged=False)), "unsuitable"),
        (number(len(report.streams)), "stream" + "s" * (len(report.streams) != 1)),
        (human(report.bytes, "B"), "in shards"),
    ]
    streams = streams_table("Streams", report.streams, "one for each task, resolution and bucket")
    about = f"Report of the data set {report.root}, written {report.written}"
    blocks: list[kit.Block] = [
        kit.Facts(facts, ["damaged"] if report.left_out(damaged=True) else []),
        kit.Notes("Worth a look.", report.notes),
        kit.Section("Where the records came from", [_sources(report), _reasons(report)]),
        _steps(report),
        kit.Section("What was written", [_tasks(report), streams, *_histograms(report)]),
    ]
    return kit.Page(report.curriculum, about, [*blocks, *more])


def _sources(report: Report) -> kit.Table:
    rows = [
        (
            kit.Cell(s.name, s.kind),
            number(s.parts),
            number(s.read),
            kit.Cell(number(s.kept), percent(s.kept / s.read) if s.read else ""),
            number(s.damaged),
            number(s.unwanted),
        )
        for s in report.sources
    ]
    return kit.Table("", ("Source", ">Partitions", ">Read", ">Kept", ">Damaged", ">Unsuitable"), rows)


def _reasons(report: Report) -> kit.Block:
    if not report.reasons:
        return "Nothing was left out."
    return reasons_table("Why records were left out", report.reasons, "all of them are in rejected.jsonl")


def _steps(report: Report) -> kit.Section:
    words = (
        "An epoch of a task is the number of optimizer steps, of the stage's global batch, in which each of its "
        "records is drawn once. A step draws its whole batch from one task; the stage's mixture says how many of "
        "its steps draw a task, and so how often every record is seen in the stage."
    )
    of_streams = [
        (stage.name, task.task, stream, f"{epoch:,.2f}")
        for stage in report.stages
        for task in stage.tasks
        for stream, epoch in task.streams.items()
    ]
    folded = kit.Table("", ("Stage", "Task", "Stream", ">Steps an epoch"), of_streams)
    details = kit.Details("Steps an epoch of each stream", [folded])
    return kit.Section("How long an epoch is", [words, steps_table("", report.stages), details])


def _tasks(report: Report) -> kit.Table:
    resolutions = sorted({resolution for task in report.tasks for resolution in task.resolutions})
    rows = [
        (
            task.task,
            number(task.kept),
            *(
                kit.Cell(number(count), percent(count / task.kept)) if (count := task.resolutions.get(r)) else "–"
                for r in resolutions
            ),
        )
        for task in report.tasks
    ]
    columns = ("Task", ">Kept", *(f">At {r} px" for r in resolutions))
    return kit.Table("Records by task", columns, rows, "a record can serve several resolutions")


def _histograms(report: Report) -> Iterable[kit.Table]:
    for title, counts, edges in (
        ("Shorter side of the source's image, px", report.sides, SIDE_EDGES),
        ("Length of the prompt, characters", report.captions, CAPTION_EDGES),
    ):
        if rows := bins(counts, edges):
            most = max(count for _, count in rows)
            bars = [(label, kit.Cell(bar=count / most), number(count)) for label, count in rows]
            yield kit.Table(title, ("", "", ">Records"), bars)


def _samples(report: Report, dataset: DataSet) -> kit.Section:
    """By task, then by resolution (the highest first), then by stream: its first records."""
    count = max(1, min(SHOWN, SHOWN_IN_ALL // len(dataset.streams)))
    blocks: list[kit.Block] = ["The first records of every stream as they are stored, not chosen."]
    for task, of_task in groupby(in_order(dataset.streams), attrgetter("settings.task")):
        sizes = {size: list(same) for size, same in groupby(of_task, attrgetter("settings.resolution"))}
        for size, streams in reversed(sizes.items()):
            title, several = f"{TASK_NAMES[task]}, {size} px", f"{len(streams)} stream{'s' * (len(streams) > 1)}"
            shown = [_stream(report, stream, count) for stream in streams]
            blocks.append(kit.Details(title, shown, several, open=size == max(sizes)))
    return kit.Section("What it looks like", blocks)


def _stream(report: Report, stream: Stream, count: int) -> kit.Gallery:
    of = stream.settings
    about = f"{number(stream.samples)} records" + f", {of.inputs} inputs" * (of.inputs > 1)
    figures = [_figure(record) for record in islice(records(report.root, stream), count)]
    return kit.Gallery("figures", figures, kit.outline(of.height, of.width), about)


def _figure(record: StoredRecord) -> kit.Figure:
    images = [kit.image(file, "input image") for file in record.images]
    if record.target:
        images += [*kit.ARROW[: len(images)], kit.image(record.target, "target image")]
    answer = kit.pale(f"→ {text.plain(record.answer, WORDS)}") if record.answer else ""
    caption = Markup("{} {}").format(text.plain(record.prompt, WORDS) or kit.pale("no words"), answer)
    return kit.Figure(images, caption, text.plain(f"{record.id}: {record.prompt}", 2 * WORDS))


# ------------------------------------------------------------------ tables that `buckets` and `inspect` show, too
def reasons_table(
    title: str, reasons: Iterable[ReasonCount], note: str = "", count: Callable[[int], str] = "{:,}".format
) -> kit.Table:
    rows = [
        (
            kit.Cell(reason.reason, "damaged" if reason.reason.damaged else "unsuitable"),
            count(reason.count),
            kit.Cell("\n".join(map(_example, reason.examples)), kind="lines"),
        )
        for reason in reasons
    ]
    return kit.Table(title, ("Reason", ">Records", "For example"), rows, note)


def _example(rejected: Rejection) -> str:
    where = " ".join(filter(None, (rejected.source, rejected.part, rejected.key)))
    return text.plain(f"{where}: {rejected.detail}" if rejected.detail else where, 200)


def steps_table(title: str, stages: Iterable[StageSteps], count: Callable[[int], str] = "{:,}".format) -> kit.Table:
    rows = [
        (
            kit.Cell(
                f"{stage.name}, {stage.resolution} px", f"{stage.steps:,} steps of {stage.global_batch:,}", "line"
            ),
            task.task if task.task == task.records_of else f"{task.task} from {task.records_of}",
            count(task.samples),
            f"{task.epoch:,.2f}",
            kit.Cell(number(task.steps), percent(task.share)),
            f"{task.epochs:,.2f}",
        )
        for stage in stages
        for task in stage.tasks
    ]
    return kit.Table(title, ("Stage", "Task", ">Records", ">Steps an epoch", ">Its steps", ">Epochs"), rows)


def streams_table(title: str, streams: Iterable[Stream], note: str = "") -> kit.Table:
    streams = in_order(streams)
    totals = samples_at(streams)
    rows = []
    for stream in streams:
        of, share = stream.settings, stream.samples / totals[stream.settings.task, stream.settings.resolution]
        rows.append(
            (
                of.name,
                kit.outline(of.height, of.width),
                number(stream.samples),
                kit.Cell(percent(share), bar=share),
                kit.Cell(number(len(shard_files(stream))), human(stream.bytes, "B")),
                number(stream.bytes // stream.samples),
                of.latents.dtype if of.latents else "none",
            )
        )
    columns = ("Stream", "Height × width", ">Records", "Share", ">Shards", ">Bytes a record", "Latents")
    return kit.Table(title, columns, rows, note)


def number(value: int) -> str:
    return f"{value:,}"


def bins(counts: dict[int, int], edges: tuple[int, ...]) -> list[tuple[str, int]]:
    """Return (`128-255`, count) for every bin from the first to the last that is not empty."""
    held = [i for i, edge in enumerate(edges) if counts.get(edge)]
    labels = [f"{low}–{high - 1}" if high - low > 1 else str(low) for low, high in pairwise(edges)]
    labels.append(f"{edges[-1]} or more")
    return [(labels[i], counts.get(edges[i], 0)) for i in range(held[0], held[-1] + 1)] if held else []
