"""What a run folder tells about its jobs."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher.job import Job, is_finished, last_step
from launcher.ledger import Event, Ledger
from launcher.lock import is_alive

# Enough of the end of metrics.jsonl to hold its last few lines.
_TAIL_BYTES = 1 << 16


@dataclass(frozen=True)
class Status:
    """State of one job in words. step and loss: of the newest metrics of a training job; None where unknown."""

    job: str
    state: str
    attempts: int
    steps: int | None = None
    step: int | None = None
    loss: float | None = None


def statuses(jobs: Sequence[Job], ledger: Ledger) -> list[Status]:
    """The status of each job, in order."""
    events = list(ledger.events())
    return [_status(job, [event for event in events if event.job == job.name]) for job in jobs]


def _status(job: Job, events: Sequence[Event]) -> Status:
    attempts = sum(event.event == "started" for event in events)
    state = _state(job, events[-1] if events else None)
    if job.steps is None:
        return Status(job.name, state, attempts)
    logged, loss = _last_metrics(job.folder / "metrics.jsonl")
    saved = last_step(job) or 0
    # A run that was broken off has logged steps which it will do again; one that runs is ahead of its checkpoint.
    step = max(saved, logged) if state == "running" else saved
    return Status(job.name, state, attempts, job.steps, step, loss)


def _state(job: Job, last: Event | None) -> str:
    if is_finished(job):
        return "finished"
    if last is None:
        return "waiting"
    if last.event == "started":
        return "running" if is_alive(last.pid) else "broken off: its launcher was killed"
    if last.reason == "finished" and job.products:
        return "out of date"
    return last.reason


def _last_metrics(file: Path) -> tuple[int, float | None]:
    """Step and loss of the last whole line that has them."""
    if not file.exists():
        return 0, None
    with file.open("rb") as content:
        content.seek(max(0, content.seek(0, os.SEEK_END) - _TAIL_BYTES))
        lines = content.read().splitlines()
    for line in reversed(lines):
        try:
            metrics = json.loads(line)
            return int(metrics["step"]), float(metrics["loss"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0, None
