"""Runs a chain of jobs on this machine, one after the other."""

import codecs
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from types import FrameType
from typing import Self, TextIO

from launcher import gate
from launcher.ending import ending
from launcher.job import Job, is_finished, last_step
from launcher.ledger import Event, Ledger
from wemmu.command_line import FAILED, SAVED, reaches
from wemmu.readable import duration

_TAIL_LINES = 15
# Waiting OpenMP threads sleep instead of spinning, unless the user sets it. Spinning is a fifth faster on idle cores,
# and ten times slower when another process uses one of them.
_PATIENT = {"OMP_WAIT_POLICY": "PASSIVE"}


def run(jobs: Sequence[Job], ledger: Ledger, lock: int) -> int:
    """Run the jobs that are not finished, in order, until one does not finish; returns the launcher's exit code.

    0: all finished. 1: a job failed, or the reader of the output ended. 75: a job was interrupted, but not through the
    launcher. 130, 143: SIGINT or SIGTERM arrived; the first is forwarded to the job, a second one kills it. The jobs
    inherit `lock`, the descriptor that excludes other launchers.
    """
    with _Interrupts() as interrupts:
        for number, job in enumerate(jobs, 1):
            if is_finished(job):
                print(f"{job.name}: already finished", flush=True)
                continue
            place = f"job {number} of {len(jobs)}"
            if left := seconds_left(jobs[number - 1 :], ledger):
                place += f", about {duration(left)} left"
            code = 0 if interrupts.received else _run_job(job, place, ledger, lock, interrupts)
            if interrupts.received:
                return FAILED if interrupts.received[0] == signal.SIGPIPE else 128 + interrupts.received[0]
            if code != 0:
                return SAVED if code == SAVED else 1
    return 0


def seconds_left(jobs: Sequence[Job], ledger: Ledger) -> float | None:
    """Estimate the seconds that `jobs` still need from this run's finished jobs; None before a stage has finished.

    A step counts as one of the last finished stage, an evaluation or a benchmark (STAGE/NAME) as the last one, any
    other job as 0.
    """
    began: dict[str, Event] = {}
    per_step, per_evaluation = None, 0.0
    for event in ledger.events():
        if event.event == "started":
            began[event.job] = event
        elif event.event == "ended" and event.reason == "finished" and event.job in began:
            seconds = (
                datetime.fromisoformat(event.time) - datetime.fromisoformat(began[event.job].time)
            ).total_seconds()
            if event.to_step is not None and event.to_step > (event.from_step or 0):
                per_step = seconds / (event.to_step - (event.from_step or 0))
            elif "/" in event.job:
                per_evaluation = seconds
    if per_step is None:
        return None
    waiting = [job for job in jobs if not is_finished(job)]
    steps = sum(job.steps - (last_step(job) or 0) for job in waiting if job.steps is not None)
    return steps * per_step + per_evaluation * sum("/" in job.name for job in waiting)


class _Interrupts:
    """Records SIGINT, SIGTERM and, as SIGPIPE, a reader that ended; the loop that waits for the job handles them."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received.append(number)

    def tell(self, words: str, stream: TextIO) -> None:
        """Print words; if their reader has ended, the job is to save."""
        if not reaches(words, stream):
            self.received = self.received or [signal.SIGPIPE]


class _Follower:
    """Reads what a job adds to its log, to show it on the terminal.

    The job writes the log itself and not through a pipe, so it can still write and save after the launcher dies.
    """

    def __init__(self, log: Path) -> None:
        self._begin = log.stat().st_size
        self._file = log.open("rb")
        self._file.seek(self._begin)
        # A character's bytes may arrive in two parts.
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def new(self) -> str:
        return self._decode(self._file.read())

    def tail(self) -> list[str]:
        """Return the last lines that this attempt wrote."""
        self._file.seek(self._begin)
        return self._file.read().decode(errors="replace").splitlines()[-_TAIL_LINES:]

    def close(self) -> None:
        self._file.close()


def _run_job(job: Job, place: str, ledger: Ledger, lock: int, interrupts: _Interrupts) -> int:
    if job.gate and (closed := gate.reasons(job.gate)):
        ledger.append(Event(job.name, 0, "refused", reason=" ".join(closed), outcome="failed"))
        print("\n".join([f"\n{job.name} cannot start:", *(f"  {why}" for why in closed)]), file=sys.stderr)
        return 1
    attempt, before = 1 + ledger.attempts(job.name), last_step(job)
    _announce(job, place, attempt, before)
    follower = _Follower(job.log)
    process = _start(job, lock)
    ledger.append(Event(job.name, attempt, "started", process.pid, from_step=before))
    code = _attend(job, process, follower, interrupts)
    interrupts.tell(follower.new(), sys.stdout)
    ended, why = ending(job, code)
    if ended == "crashed" and interrupts.received:
        why = "was interrupted" if len(interrupts.received) == 1 else "was killed by a second interrupt"
    after = last_step(job)
    ledger.append(Event(job.name, attempt, "ended", process.pid, code, before, after, why, ended))
    if why != "finished":
        where = "" if after is None else f" at step {after} of {job.steps}"
        interrupts.tell(f"\n{job.name} {why}{where}. Its log: {job.log}\n", sys.stderr)
        if code not in (0, SAVED) and not interrupts.received:
            interrupts.tell("".join(["Its last lines:\n", *(f"    {line}\n" for line in follower.tail())]), sys.stderr)
    follower.close()
    return 0 if why == "finished" else code or 1


def _announce(job: Job, place: str, attempt: int, step: int | None) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    again = f", attempt {attempt}" if attempt > 1 else ""
    resumed = f", from step {step} of {job.steps}" if step else ""
    print(f"\n--- {job.name} ({place}){again}{resumed} ---", flush=True)
    with job.log.open("a", encoding="utf-8") as log:
        log.write(f"--- attempt {attempt}: {shlex.join(job.command)}\n")


def _start(job: Job, lock: int) -> subprocess.Popen[bytes]:
    with job.log.open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "launcher.child", str(os.getpid()), *_command(job)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=_PATIENT | os.environ | {"PYTHONUNBUFFERED": "1"},
            pass_fds=(lock,),
            # Out of the terminal's process group, or Ctrl-C would reach the job twice: directly and forwarded.
            start_new_session=True,
        )


def _command(job: Job) -> tuple[str, ...]:
    """The command that runs a job on this machine alone, with all of its ranks watched."""
    if job.hang_after is None:
        return job.command
    watched = ("--hang-after", str(job.hang_after), str(job.ranks))
    return (sys.executable, "-m", "launcher.ranks", *watched, *job.command)


def _attend(job: Job, process: subprocess.Popen[bytes], follower: _Follower, interrupts: _Interrupts) -> int:
    """Wait for the job to end, showing its output and passing signals on; returns its exit code."""
    passed_on = 0
    while True:
        interrupts.tell(follower.new(), sys.stdout)
        count = len(interrupts.received)
        if passed_on == 0 and count > 0:
            first = interrupts.received[0]
            process.send_signal(signal.SIGTERM if first == signal.SIGPIPE else first)
            stopping = f"\nstopping {job.name}, which may save its state first; a second Ctrl-C kills it\n"
            interrupts.tell(stopping, sys.stderr)
            passed_on = 1
        elif passed_on == 1 and count > 1:
            os.killpg(process.pid, signal.SIGKILL)
            passed_on = 2
        # Not wait(timeout): it polls some 80 times a second for as long as the job runs, on a machine that trains.
        if (code := process.poll()) is not None:
            return code
        time.sleep(0.1)
