"""The state of the jobs of a chain, from the run folder and from Slurm."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.job import Job, is_finished, last_step, resolution_end
from launcher.ledger import Event, Ledger
from launcher.slurm import Queued, SlurmError, show
from wemmu.jsonlines import new_lines
from wemmu.locks import is_alive

# Enough of the end of metrics.jsonl to hold its last few lines.
_TAIL_BYTES = 1 << 16
# Slurm's reasons why a job waits -> words.
_WAITS = {
    "BeginTime": "starts again soon",
    "Priority": "queued behind other jobs",
    "Resources": "queued until nodes are free",
}


@dataclass(frozen=True)
class Status:
    """State of one job in words; attempts: the number of starts.

    For a training job, None if unknown: step and steps, loss and samples per second of the newest metrics, and
    seconds_left at that speed.
    """

    job: str
    state: str
    attempts: int
    steps: int | None = None
    step: int | None = None
    loss: float | None = None
    samples_per_s: float | None = None
    seconds_left: float | None = None


def statuses(jobs: Sequence[Job], ledger: Ledger, queued: Mapping[str, Queued] | None = None) -> list[Status]:
    """Return the status of each job, in order. `queued`: jobs in Slurm's queue; None if Slurm was not asked."""
    # A changed config does not affect the state.
    events = [event for event in ledger.events() if event.event != "changed"]
    return [_status(job, [event for event in events if event.job == job.name], queued) for job in jobs]


def _status(job: Job, events: Sequence[Event], queued: Mapping[str, Queued] | None) -> Status:
    attempts = sum(event.event == "started" for event in events)
    state = _state(job, events, queued)
    if job.steps is None:
        return Status(job.name, state, attempts)
    if (end := resolution_end(job)) is not None and is_finished(job):
        loss = _last_metrics(job.folder / "metrics.jsonl", until=end).get("loss")
        return Status(job.name, state, attempts, end, end, loss)
    if job.resolution is not None and not attempts:
        # What the folder tells is of the resolutions below.
        return Status(job.name, state, attempts)
    metrics = _last_metrics(job.folder / "metrics.jsonl")
    logged, saved, runs = int(metrics.get("step", 0)), last_step(job) or 0, state.startswith("running")
    # An interrupted run has logged steps that it will repeat; a running one is ahead of its checkpoint.
    step = max(saved, logged) if runs else saved
    speed = metrics.get("samples_per_s") if runs else None
    batch = metrics["samples"] / logged if logged and "samples" in metrics else None
    left = (job.steps - step) * batch / speed if speed and batch else None
    return Status(job.name, state, attempts, job.steps, step, metrics.get("loss"), speed, left)


def _state(job: Job, events: Sequence[Event], queued: Mapping[str, Queued] | None) -> str:
    if queued and (now := queued.get(job.name)):
        return f"running on {now.nodes}, job {now.id}" if now.state == "RUNNING" else _waiting(job, now, queued)
    if is_finished(job):
        return "finished"
    if not events:
        return "waiting"
    last = events[-1]
    match last.event:
        case "started" | "warned" if last.slurm is None:
            return "running" if last.pid and is_alive(last.pid) else "interrupted: its launcher was killed"
        case "started" | "warned" | "requeued":
            return "not asked of Slurm" if queued is None else f"lost: Slurm no longer has job {last.slurm}"
        case "submitted":
            return "not asked of Slurm" if queued is None else _never_started(last.slurm)
        case "refused":
            return f"refused: {last.reason}"
        case "cancelled":
            return f"cancelled: {last.reason}"
    return "out of date" if last.reason == "finished" and job.products else last.reason


def _never_started(id: int | None) -> str:
    """Return the state of a job that left the queue without an attempt."""
    try:
        said = show(id) if id is not None else {}
    except SlurmError as error:
        return f"ended before its attempt began; Slurm does not answer why: {error}"
    state, log = said.get("JobState"), said.get("StdOut", "")
    if state is None:
        return f"ended before its attempt began; Slurm no longer knows job {id}"
    if state == "CANCELLED":
        return "cancelled: a job it waited for did not finish"
    code = said.get("ExitCode", "unknown")
    return f"failed before its attempt began: {state}, exit code {code}; its log: {log}"


def _waiting(job: Job, now: Queued, queued: Mapping[str, Queued]) -> str:
    if now.state != "PENDING":
        return f"{now.state.lower()}, job {now.id}"
    if now.reason == "Dependency":
        before = [name for name in job.after if name in queued]
        return f"waits for {before[0] if len(before) == 1 else f'{len(before)} jobs'}"
    return f"{_WAITS.get(now.reason, f'queued: {now.reason}')}, job {now.id}"


def _last_metrics(file: Path, until: float = math.inf) -> dict[str, Any]:
    """Return the last whole line with a loss up to step `until`; empty if there is none near the end of the file."""
    size = file.stat().st_size if file.exists() else 0
    lines, _ = new_lines(file, max(0, size - _TAIL_BYTES))
    for metrics in reversed(lines):
        try:
            if "loss" in metrics and metrics["step"] <= until:
                return {key: float(value) for key, value in metrics.items()}
        except (ValueError, TypeError):
            continue
    return {}
