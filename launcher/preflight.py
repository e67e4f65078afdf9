"""Checks a curriculum without torch for everything that would fail after the submission."""

from pathlib import Path

from wemmu.config import Curriculum
from wemmu.diagnosis.findings import examine
from wemmu.diagnosis.preflight import calls, planned_memory


def problems(curriculum: Curriculum, run: Path) -> list[str]:
    """Return the problems, each with its remedy; empty if the curriculum can run."""
    findings = [examine(check, *arguments) for check, *arguments in calls(curriculum, run)]
    return [f"  {f.name}: {f.found}\n    -> {f.remedy}" for f in findings if f.status == "problem"]


def warnings(curriculum: Curriculum, gpu: str | None) -> list[str]:
    """Return warnings for GPUs of this kind, by the plan."""
    finding = examine(planned_memory, curriculum, gpu) if gpu else None
    if finding is None or finding.status == "ok":
        return []
    return [f"warning: {finding.name}: {finding.found}\n    -> {finding.remedy}"]
