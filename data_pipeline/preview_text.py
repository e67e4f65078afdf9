"""`python -m data_pipeline buckets`: the preview as tables."""

from collections import Counter

from rich.console import Console
from rich.text import Text

from data_pipeline.buckets import buckets
from data_pipeline.plan import Job, plan
from data_pipeline.preview import Fit, Survey, survey
from data_pipeline.report_record import stage_steps
from data_pipeline.report_text import derived, number, plain, table
from wemmu.config import Curriculum
from wemmu.config.shards import Stream, StreamSettings


def show_buckets(curriculum: Curriculum, console: Console, sample: int) -> None:
    """Print what the curriculum's buckets would do with `sample` records of each source.

    Raises:
        ConfigError: if the curriculum prepares no data, or a source has nothing at its path.
    """
    job = plan(curriculum)
    surveys = [survey(job, config, sample) for config in job.prepare.sources]
    streams: Counter[StreamSettings] = Counter()
    for found in surveys:
        streams.update({stream: found.scaled(count) for stream, count in found.streams.items()})
    _sources(surveys, console)
    for resolution in sorted({r for resolutions in job.resolutions.values() for r in resolutions}):
        _resolution(resolution, job, surveys, console)
    exact = all(found.looked == found.records for found in surveys)
    _steps(curriculum, streams, exact, console)
    if not exact:
        console.print(Text(f"Numbers marked ~ are estimates from a sample; --sample {10 * sample} looks at more."))
    console.print(
        Text("Only headers were read: duplicates, and pictures that are cut off or damaged, are found when writing.")
    )


def _sources(surveys: list[Survey], console: Console) -> None:
    console.print(
        table(
            "Sources",
            ("source", "kind", ">parts", ">records", ">looked at", ">left out"),
            (
                (
                    s.name,
                    s.kind,
                    number(s.parts),
                    about(s.records, s.exact),
                    number(s.looked),
                    f"{s.reasons.total() / s.looked:.1%}" if s.looked else "-",
                )
                for s in surveys
            ),
        )
    )
    left_out = [(s, reason, count) for s in surveys for reason, count in s.reasons.most_common()]
    if left_out:
        console.print(
            table(
                "Left out",
                ("source", "reason", ">records", "for example"),
                (
                    (s.name, reason, about(s.scaled(count), s.looked == s.records), _example(s, reason))
                    for s, reason, count in left_out
                ),
            )
        )


def _resolution(resolution: int, job: Job, surveys: list[Survey], console: Console) -> None:
    unit, exact = job.prepare.pictures.unit, all(s.looked == s.records for s in surveys)
    counts, fits = Counter(), {}
    for found in surveys:
        for stream, count in found.streams.items():
            if stream.resolution == resolution:
                counts[stream.height, stream.width] += found.scaled(count)
        for (at, bucket), fit in found.fits.items():
            if at == resolution:
                total = fits.setdefault(bucket, Fit())
                total.pictures += fit.pictures
                total.cut += fit.cut
                total.enlargement += fit.enlargement
    rows = []
    for height, width in buckets(resolution, job.prepare.pictures):
        count, fit = counts[height, width], fits.get((height, width))
        rows.append(
            (
                f"{height}x{width}",
                f"{width / height:.2f}",
                f"{height * width / resolution**2 - 1:+.1%}",
                f"{height // unit}x{width // unit}",
                about(count, exact) if count else "-",
                f"{count / counts.total():.1%}" if count else "-",
                f"{fit.cut / fit.pictures:.1%}" if fit else "-",
                f"{fit.enlargement / fit.pictures:.2f}" if fit else "-",
            )
        )
    several = "s" if len(rows) > 1 else ""
    title = f"{resolution} px: {len(rows)} bucket{several} of about {resolution**2:,} px in steps of {unit} px"
    columns = ("height x width", ">aspect", ">area", f">in {unit} px", ">records", ">share", ">cut off", ">scaled by")
    console.print(table(title, columns, rows))


def _steps(curriculum: Curriculum, counts: Counter[StreamSettings], exact: bool, console: Console) -> None:
    streams = [Stream(settings=s, samples=count, bytes=0, files={}) for s, count in counts.items() if count]
    rows = [
        (
            f"{stage.name}, {stage.resolution} px",
            number(stage.global_batch),
            derived(row.task, row.records_of),
            about(row.samples, exact),
            f"{row.epoch:,.2f}",
            f"{row.epochs:,.2f}",
        )
        for stage in (stage_steps(rung, streams) for stage in curriculum.stages for rung in stage.rungs)
        for row in stage.tasks
    ]
    columns = ("stage", ">batch", "task", ">records", ">steps/epoch", ">epochs")
    console.print(table("Steps", columns, rows))


def about(count: int, exact: bool) -> str:
    return number(count) if exact else f"~{number(count)}"


def _example(found: Survey, reason: str) -> str:
    rejection = found.examples[reason]
    return plain(f"{rejection.key or rejection.part}: {rejection.detail}" if rejection.detail else rejection.key, 100)
