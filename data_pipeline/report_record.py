"""The numbers of the report, computed from the ledger."""

import re
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from data_pipeline.ledger import Entry
from data_pipeline.records import Reason, Rejection
from wemmu.config import Curriculum
from wemmu.config.prepare import EditsSource, Source
from wemmu.config.serving import serving, sources_of
from wemmu.config.shards import DataSet, Schema, Stream
from wemmu.config.stage import ResolutionStep
from wemmu.config.task import Task

JSON_FILE, TEXT_FILE, HTML_FILE = "report.json", "report.txt", "report.html"
# Examples of each reason for a rejection.
EXAMPLES = 3


class SourceCount(Schema):
    """The records of a source for the tasks of the stages, and their fate."""

    name: str
    kind: str
    parts: int = 0
    read: int = 0
    kept: int = 0
    damaged: int = 0
    unwanted: int = 0


class ReasonCount(Schema):
    reason: Reason
    count: int
    examples: tuple[Rejection, ...]


class TaskCount(Schema):
    """`kept` counts records, `resolutions` how many of them serve each resolution: one may serve several."""

    task: Task
    kept: int
    resolutions: dict[int, int]


class TaskSteps(Schema):
    """A task in a stage. The loader uses the records of the task `records_of`, the task itself if it has records.

    `epoch` is the exact number of optimizer steps in which every record is drawn once. `steps` is the number of the
    stage's steps with this task (rounded: the loader follows the mixture to within a step or two), in epochs `epochs`.
    """

    task: Task
    records_of: Task
    share: float
    samples: int
    epoch: float
    steps: int
    epochs: float
    # Steps of an epoch by stream.
    streams: dict[str, float]


class StageSteps(Schema):
    name: str
    resolution: int
    global_batch: int
    steps: int
    tasks: tuple[TaskSteps, ...]


class Report(Schema):
    """`sides` and `captions`: the sums of `ledger.Entry`. `notes` are warnings in sentences."""

    curriculum: str
    root: Path
    written: str
    read: int
    kept: int
    bytes: int
    sources: tuple[SourceCount, ...]
    reasons: tuple[ReasonCount, ...]
    # Records of unused tasks.
    unused: int
    tasks: tuple[TaskCount, ...]
    streams: tuple[Stream, ...]
    sides: dict[int, int]
    captions: dict[int, int]
    stages: tuple[StageSteps, ...]
    notes: tuple[str, ...]

    def left_out(self, damaged: bool) -> int:
        return sum(reason.count for reason in self.reasons if reason.reason.damaged == damaged)


def report_of(curriculum: Curriculum, dataset: DataSet, ledger: Iterable[Entry]) -> Report:
    """Compute the report of a data set written for `curriculum`; reads `ledger` once, entry by entry."""
    by_source: dict[str, Counter[str]] = {}
    reasons: Counter[Reason] = Counter()
    examples: dict[Reason, list[Rejection]] = {}
    tasks, sides, captions = Counter[Task](), Counter[int](), Counter[int]()
    unused = Counter[Task]()
    for entry in ledger:
        source = by_source.setdefault(entry.source, Counter())
        source.update(parts=1, read=entry.read, kept=sum(entry.tasks.values()), damaged=entry.damaged)
        source.update(unwanted=len(entry.rejected) - entry.damaged)
        tasks.update(entry.tasks)
        unused.update(entry.unused)
        sides.update(entry.sides)
        captions.update(entry.captions)
        for rejected in entry.rejected:
            reasons[rejected.reason] += 1
            if len(found := examples.setdefault(rejected.reason, [])) < EXAMPLES:
                found.append(rejected)
    prepare = curriculum.data.prepare
    sources = [
        SourceCount(name=s.name, kind=s.kind, **by_source.get(s.name, Counter()))
        for s in (prepare.sources if prepare else ())
    ]
    stages = [stage_steps(step, dataset.streams) for stage in curriculum.stages for step in stage.resolution_steps]
    samples = samples_at(dataset.streams)
    return Report(
        curriculum=curriculum.name,
        root=curriculum.data.shards,
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
        read=sum(s.read for s in sources),
        kept=sum(s.kept for s in sources),
        unused=unused.total(),
        bytes=sum(s.bytes for s in dataset.streams),
        sources=tuple(sources),
        reasons=tuple(
            ReasonCount(reason=reason, count=count, examples=tuple(examples[reason]))
            for reason, count in reasons.most_common()
        ),
        tasks=tuple(
            TaskCount(task=task, kept=tasks[task], resolutions={r: n for (of, r), n in samples.items() if of == task})
            for task in Task
            if task in tasks
        ),
        streams=tuple(in_order(dataset.streams)),
        sides=dict(sorted(sides.items())),
        captions=dict(sorted(captions.items())),
        stages=tuple(stages),
        notes=tuple([*_notes(sources, stages, unused), *swapped(prepare.sources if prepare else ())]),
    )


def stage_steps(stage: ResolutionStep, streams: Iterable[Stream]) -> StageSteps:
    """Return the length of an epoch of each task of the stage at this resolution."""
    begin, end = stage.span
    streams, rows = list(streams), []
    for task, weight in stage.mixture.items():
        serve = serving(streams, task, stage.resolution)
        records_of = serve[0].settings.task if serve else sources_of(task)[-1]
        counts = {stream.settings.name: stream.samples for stream in serve}
        samples, share = sum(counts.values()), weight / sum(stage.mixture.values())
        steps = round((end - begin) * share)
        rows.append(
            TaskSteps(
                task=task,
                records_of=records_of,
                share=share,
                samples=samples,
                epoch=samples / stage.global_batch,
                steps=steps,
                epochs=steps * stage.global_batch / samples if samples else 0.0,
                streams={name: count / stage.global_batch for name, count in counts.items()},
            )
        )
    return StageSteps(
        name=stage.label,
        resolution=stage.resolution,
        global_batch=stage.global_batch,
        steps=end - begin,
        tasks=tuple(rows),
    )


def in_order(streams: Iterable[Stream]) -> list[Stream]:
    """Sort by task, then from low to high resolution, then from tall to wide."""
    tasks = list(Task)
    return sorted(
        streams,
        key=lambda s: (
            tasks.index(s.settings.task),
            s.settings.resolution,
            s.settings.width / s.settings.height,
            s.settings.name,
        ),
    )


def samples_at(streams: Iterable[Stream]) -> Counter[tuple[Task, int]]:
    """Count the records of each task and resolution, from low to high."""
    found: Counter[tuple[Task, int]] = Counter()
    for stream in in_order(streams):
        found[stream.settings.task, stream.settings.resolution] += stream.samples
    return found


def _notes(sources: list[SourceCount], stages: list[StageSteps], unused: Counter[Task]) -> list[str]:
    notes = [
        f"{count:,} records have the task {task}, which no stage uses; they are not written "
        "(data.prepare.also adds the task)."
        for task, count in unused.items()
    ]
    notes += [f"The source {s.name} gave no record." for s in sources if not s.read]
    notes += [f"Nothing of the source {s.name} was kept." for s in sources if s.read and not s.kept]
    for stage in stages:
        for row in stage.tasks:
            small = [name for name, epoch in row.streams.items() if epoch < 1]
            if not row.samples:
                notes.append(
                    f"{stage.name} mixes {row.task}, but there is no record of it at {stage.resolution} px: it cannot "
                    "train on this data set."
                )
            elif small:
                notes.append(
                    f"{stage.name} has a global batch of {stage.global_batch}, but {_some(small)} "
                    f"{'has' if len(small) == 1 else 'have'} fewer records: some occur more than once in a step."
                )
    return list(dict.fromkeys(notes))


# Words in the names of columns. "image" and the like tell nothing; "source" and "original" name what is edited.
_BEFORE = {"input", "source", "src", "original", "orig", "before", "unedited", "reference"}
_AFTER = {"output", "target", "edited", "edit", "after", "result", "modified", "generated", "tgt"}


def swapped(sources: Iterable[Source]) -> list[str]:
    """Return a sentence for each source of edits whose columns seem to be swapped, by their names alone.

    A hint and no proof: a set may say `source` of what it makes. A set whose columns have names without such words, or
    that lists all images in one column, is not judged.
    """
    found = []
    for source in (s for s in sources if isinstance(s, EditsSource) and s.input != s.target):
        given, made = (set(re.findall("[a-z]+", name.lower())) for name in (source.input, source.target))
        wrong = [f"input is the column {source.input}"] * bool(given & _AFTER and not given & _BEFORE)
        wrong += [f"target is the column {source.target}"] * bool(made & _BEFORE and not made & _AFTER)
        if wrong:
            found.append(
                f"The source {source.name} may have its columns swapped: {' and '.join(wrong)}. A model that trains on "
                "swapped edits learns to undo them; look at the first records below, left of the arrow is the input."
            )
    return found


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more streams"
