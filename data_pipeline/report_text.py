"""Numbers as text: the tables of the report, and the words that all that is shown has in common."""

import io
from collections.abc import Iterable, Iterator
from itertools import pairwise

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from data_pipeline.ledger import CAPTION_EDGES, SIDE_EDGES, Rejected
from data_pipeline.report_record import Report

BAR = 24


def as_text(report: Report) -> str:
    """The whole report in lines of at most 120 characters."""
    console = Console(file=io.StringIO(), width=120)
    for part in tables(report):
        console.print(part)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def tables(report: Report) -> Iterator[RenderableType]:
    """The report from top to bottom."""
    yield Text(f"{report.curriculum}: {report.root}\n{headline(report)}\n")
    for note in report.notes:
        yield Text(f"! {note}\n")
    yield table(
        "Sources",
        ("source", "kind", ">parts", ">read", ">kept", ">damaged", ">unwanted"),
        ((s.name, s.kind, *map(number, (s.parts, s.read, s.kept, s.damaged, s.unwanted))) for s in report.sources),
    )
    if report.reasons:
        yield table(
            "Left out",
            ("reason", ">records", "for example"),
            (
                (f"{r.reason} ({'damaged' if r.damaged else 'unwanted'})", number(r.count), example(r.examples[0]))
                for r in report.reasons
            ),
        )
    resolutions = sorted({resolution for task in report.tasks for resolution in task.resolutions})
    yield table(
        "Tasks",
        ("task", ">kept", *(f">at {r} px" for r in resolutions)),
        ((t.task, number(t.kept), *(number(t.resolutions.get(r, 0)) for r in resolutions)) for t in report.tasks),
    )
    yield table(
        "Streams",
        ("stream, height x width", ">records", ">share", ">MB", ">bytes/record", "latents"),
        (
            (
                s.name,
                number(s.samples),
                f"{s.share:.1%}",
                f"{s.bytes / 1e6:.1f}",
                number(s.bytes // s.samples),
                "yes" if s.latents else "no",
            )
            for s in report.streams
        ),
    )
    yield histogram("Shorter side of the source's picture, px", report.sides, SIDE_EDGES)
    yield histogram("Length of the prompt, characters", report.captions, CAPTION_EDGES)
    for stage in report.stages:
        yield table(
            f"Stage {stage.name}: {stage.steps} steps of {stage.global_batch} records at {stage.resolution} px",
            ("task", ">records", ">steps an epoch", ">share", ">its steps", ">epochs"),
            (
                (
                    derived(t.task, t.records_of),
                    number(t.samples),
                    f"{t.epoch:,.2f}",
                    f"{t.share:.1%}",
                    number(t.steps),
                    f"{t.epochs:,.2f}",
                )
                for t in stage.tasks
            ),
        )


def headline(report: Report) -> str:
    """One sentence of what became of the records."""
    damaged, unwanted = (number(report.left_out(damaged)) for damaged in (True, False))
    return (
        f"{number(report.read)} records read, {number(report.kept)} kept, {damaged} damaged, {unwanted} not wanted; "
        f"{len(report.streams)} streams, {report.bytes / 1e6:,.1f} MB"
    )


def table(title: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> RenderableType:
    """Columns whose heading begins with ">" hold numbers. Nothing in a cell is taken as markup."""
    made = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        made.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    for row in rows:
        made.add_row(*map(Text, row))
    return Group(made, Text())


def bins(counts: dict[int, int], edges: tuple[int, ...]) -> list[tuple[str, int]]:
    """(`128-255`, count) for every bin between the first and the last that hold anything."""
    held = [i for i, edge in enumerate(edges) if counts.get(edge)]
    if not held:
        return []
    labels = [f"{low}–{high - 1}" if high - low > 1 else str(low) for low, high in pairwise(edges)]
    labels.append(f"{edges[-1]} or more")
    return [(labels[i], counts.get(edges[i], 0)) for i in range(held[0], held[-1] + 1)]


def histogram(title: str, counts: dict[int, int], edges: tuple[int, ...]) -> RenderableType:
    rows = bins(counts, edges)
    most = max((count for _, count in rows), default=1)
    drawn = [(label, number(count), "█" * max(count > 0, round(BAR * count / most))) for label, count in rows]
    return table(title, ("", ">records", ""), drawn) if rows else Text(f"{title}: of no record\n")


def number(value: int) -> str:
    return f"{value:,}"


def derived(task: str, records_of: str) -> str:
    """The task, and where its records come from if it has none of its own."""
    return task if task == records_of else f"{task} from {records_of}"


def example(rejected: Rejected) -> str:
    where = f"{rejected.source} {rejected.part}" + (f" {rejected.key}" if rejected.key else "")
    return plain(f"{where}: {rejected.detail}" if rejected.detail else where)


def plain(text: str, limit: int = 200) -> str:
    """One line without control characters, with which the data of a stranger could steer the terminal."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= limit else line[: limit - 1] + "…"
