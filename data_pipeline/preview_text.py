"""`wemmu data buckets`: the preview as tables."""

from collections import Counter
from collections.abc import Callable, Iterator
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.text import Text

from data_pipeline.plan import Job, plan
from data_pipeline.preview import Survey, survey
from data_pipeline.report import number, reasons_table, steps_table
from data_pipeline.report_record import ReasonCount, stage_steps
from wemmu.config import Curriculum
from wemmu.config.buckets import buckets
from wemmu.config.shards import Stream, StreamSettings
from wemmu.report.page import Table
from wemmu.report.text import table

Count = Callable[[int], str]


def show_buckets(curriculum: Curriculum, console: Console, sample: int) -> dict[str, Any]:
    """Print the preview of the curriculum's buckets, from `sample` records of each source; return it for JSON.

    Raises:
        ConfigError: if the curriculum prepares no data, or there is nothing at a source's path.
    """
    job = plan(curriculum)
    surveys = [survey(job, config, sample) for config in job.prepare.sources]
    exact = all(found.looked == found.records for found in surveys)
    for each in _tables(curriculum, job, surveys, number if exact else "~{:,}".format):
        console.print(table(each))
    if not exact:
        console.print(Text(f"Numbers marked ~ are estimates from a sample; --sample {10 * sample} looks at more."))
    console.print(
        Text("Only headers were read: duplicates, and images that are cut off or damaged, are found when writing.")
    )
    streams, steps = _streams(surveys), [step for stage in curriculum.stages for step in stage.resolution_steps]
    return {
        "exact": exact,
        "sources": [
            {name: getattr(found, name) for name in ("name", "kind", "parts", "records", "exact", "looked")}
            | {"left_out": {reason: found.scaled(count) for reason, count in found.reasons.items()}}
            for found in surveys
        ],
        "streams": [{**stream.settings.model_dump(mode="json"), "records": stream.samples} for stream in streams],
        "steps": [stage_steps(step, streams).model_dump(mode="json") for step in steps],
    }


def _streams(surveys: list[Survey]) -> list[Stream]:
    counts: Counter[StreamSettings] = Counter()
    for found in surveys:
        counts.update({stream: found.scaled(count) for stream, count in found.streams.items()})
    return [Stream(settings=s, samples=count, bytes=0, files={}) for s, count in counts.items() if count]


def _tables(curriculum: Curriculum, job: Job, surveys: list[Survey], about: Count) -> Iterator[Table]:
    yield Table(
        "Sources",
        ("Source", "Kind", ">Parts", ">Records", ">Looked at", ">Left out"),
        [
            (
                found.name,
                found.kind,
                number(found.parts),
                number(found.records) if found.exact else f"~{number(found.records)}",
                number(found.looked),
                f"{found.reasons.total() / found.looked:.1%}" if found.looked else "-",
            )
            for found in surveys
        ],
    )
    left_out = [
        ReasonCount(
            reason=reason,
            count=found.scaled(count),
            examples=(found.examples[reason],),
        )
        for found in surveys
        for reason, count in found.reasons.most_common()
    ]
    if left_out:
        yield reasons_table("Left out", left_out, count=about)
    streams = _streams(surveys)
    for resolution in sorted({r for resolutions in job.resolutions.values() for r in resolutions}):
        yield _resolution(resolution, job, streams, surveys, about)
    steps = [step for stage in curriculum.stages for step in stage.resolution_steps]
    yield steps_table("Steps", [stage_steps(step, streams) for step in steps], about)


def _resolution(resolution: int, job: Job, streams: list[Stream], surveys: list[Survey], about: Count) -> Table:
    unit, counts = job.prepare.images.unit, Counter[tuple[int, int]]()
    for stream in streams:
        if stream.settings.resolution == resolution:
            counts[stream.settings.height, stream.settings.width] += stream.samples
    rows = []
    for height, width in buckets(resolution, job.prepare.images):
        count = counts[height, width]
        fits = [fit for found in surveys for fit in found.fits.get((resolution, (height, width)), ())]
        rows.append(
            (
                f"{height}x{width}",
                f"{width / height:.2f}",
                f"{height * width / resolution**2 - 1:+.1%}",
                f"{height // unit}x{width // unit}",
                about(count) if count else "-",
                f"{count / counts.total():.1%}" if count else "-",
                f"{fmean(cut for cut, _ in fits):.1%}" if fits else "-",
                f"{fmean(scale for _, scale in fits):.2f}" if fits else "-",
            )
        )
    several = "s" if len(rows) > 1 else ""
    title = f"{resolution} px: {len(rows)} bucket{several} of about {resolution**2:,} px in steps of {unit} px"
    columns = ("Height x width", ">Aspect", ">Area", f">In {unit} px", ">Records", ">Share", ">Cut off", ">Scaled by")
    return Table(title, columns, rows)
