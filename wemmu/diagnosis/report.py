"""Runs all checks and prints the findings for people and for programs."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from wemmu.config import Curriculum, load_curriculum
from wemmu.diagnosis import curriculum as curricula
from wemmu.diagnosis import devices, host, preflight, processes, services, software
from wemmu.diagnosis.findings import Call, Finding, Status, examine

Report = dict[str, list[Finding]]

_STYLES: dict[Status, str] = {"ok": "green", "warning": "yellow", "problem": "bold red"}


def diagnose(path: Path | None) -> Report:
    """Return area -> findings, in the order of the checks; with a curriculum, also whether it can run."""
    report: Report = {}
    asked: Curriculum | None = None
    if path is not None:
        report["curriculum"] = [examine(preflight.loads, path)]
        if report["curriculum"][0].status == "ok":
            asked = load_curriculum(path)
    # The launcher's default folder for runs.
    run = Path("runs") / (asked.name if asked else "")
    areas: dict[str, list[Call]] = {
        "software": software.calls(),
        "devices and kernels": devices.calls(),
        "processes": processes.calls(),
        "host": host.calls(run),
        "services": services.calls(asked),
        "curriculum": curricula.calls(asked, run) if asked else [],
    }
    found = {area: [examine(*call) for call in calls] for area, calls in areas.items()}
    found["curriculum"] = [*report.get("curriculum", []), *found["curriculum"]]
    return {area: findings for area, findings in found.items() if findings}


def of_status(report: Report, status: Status) -> list[Finding]:
    return [finding for findings in report.values() for finding in findings if finding.status == status]


def as_json(report: Report) -> dict[str, Any]:
    """Return `ok`, which agrees with the exit code, and every finding with its area."""
    findings = [{"area": area, **asdict(one)} for area, all_ in report.items() for one in all_]
    return {"ok": not of_status(report, "problem"), "findings": findings}


def render(report: Report, every: bool = False) -> Group:
    """Print problems, then warnings, with remedies, and the verdict; of `ok` only the number, unless `every`."""
    shown = [*_list(report, "problem"), *_list(report, "warning")]
    return Group(*shown, *([_table(report)] if every else []), _verdict(report, every))


def _table(report: Report) -> Table:
    table = Table(box=box.HORIZONTALS, padding=(0, 1, 0, 0), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for area, findings in report.items():
        table.add_row(Text(area, "bold"))
        for one in findings:
            # A Text, not a string: rich would read brackets in an error as markup.
            table.add_row(Text(one.name), Text(one.status, _STYLES[one.status]), Text(one.found))
        table.add_section()
    return table


def _list(report: Report, status: Status) -> Iterator[Text]:
    for one in of_status(report, status):
        yield Text.assemble(
            (f"{status}: ", _STYLES[status]), (one.name, "bold"), f": {one.found}\n    remedy: {one.remedy}"
        )


def _verdict(report: Report, every: bool) -> Text:
    problems, warnings, fine = (len(of_status(report, status)) for status in ("problem", "warning", "ok"))
    of = f"{fine} ok{'' if every else ' (--all lists them)'}"
    if problems:
        return Text(f"{of}, {problems} problem{'s' * (problems > 1)} to solve first", _STYLES["problem"])
    return Text(f"{of}, nothing is wrong{f', {warnings} to know of' if warnings else ''}", _STYLES["ok"])
