"""Locks a run folder for one launcher, and a job for one attempt."""

import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from launcher.job import Job
from wemmu.locks import LEASE_S, SHARED, Holder, hold, is_dead

# How long a job may take to save its state after its launcher was killed.
PATIENCE_S = 60.0
# LOCK: held by the process that runs jobs. SUBMISSION: held by the process that submits; its jobs need the other lock.
LOCK, SUBMISSION = "lock", "submit.lock"


def locked(run: Path, patience: float = PATIENCE_S, name: str = LOCK) -> AbstractContextManager[int]:
    """Lock the run folder; the descriptor of the lock is what opens. `name` selects the lock, as `SUBMISSION`.

    Jobs inherit the descriptor, so the kernel frees the lock when the launcher AND its job have ended. If a launcher
    was killed, this waits for its job to save and stop, at most `patience` seconds.

    Raises:
        LockedError: names the process that holds the lock.
    """

    def busy(holder: Holder) -> str:
        if is_dead(holder):
            return (
                f"a job of {run} still runs, in Slurm or left by a launcher (pid {holder['pid']}) that was killed: "
                f"`wemmu status {shlex.quote(str(run))}` shows which"
            )
        who = f"another launcher (pid {holder['pid']})" if holder else "a Slurm job, or a launcher that has just begun,"
        return f"{who} is at work on {run}; wait for it, stop it, or give another folder with --run"

    run.mkdir(parents=True, exist_ok=True)
    return hold(run / name, busy, patience_s=patience, waits_for=is_dead)


@contextmanager
def at_work(run: Path, job: Job, patience: float = LEASE_S) -> Iterator[None]:
    """Lock one job of a run folder until this process ends; other processes may lock other jobs.

    An attempt on a failed node may still hold the lock; this waits for it, at most `patience` seconds.

    Raises:
        LockedError: if the job is at work elsewhere, or a launcher works on the whole folder.
    """
    job.folder.mkdir(parents=True, exist_ok=True)
    # The resolutions of a stage train in one folder, so only one may run.
    own = job.folder / "train.lock" if job.steps is not None else job.log.with_name(f"{job.log.name}.lock")

    def busy(file: Path) -> str:
        return f"{job.name} of {run} is at work elsewhere: {file} is held"

    with (
        hold(run / LOCK, lambda _: busy(run / LOCK), SHARED, patience),
        hold(own, lambda _: busy(own), patience_s=patience),
    ):
        yield
