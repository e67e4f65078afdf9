"""One launcher at a time on a run folder."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from launcher.job import Job
from wemmu.locks import EXCLUSIVE, SHARED, is_alive, take
from wemmu.locks import LockedError as LockedError

# Seconds that a job may take to save after its launcher was killed.
PATIENCE_S = 60.0
# Seconds that a lock may outlive its node: a file server waits so long for a lost client (NFS 4: 90 s).
LEASE_S = 180.0
# Locks of the launcher that runs jobs and of the one that submits: jobs that start at once need the first.
LOCK, SUBMISSION = "lock", "submit.lock"


@contextmanager
def locked(run: Path, patience: float = PATIENCE_S, name: str = LOCK) -> Iterator[int]:
    """Lock the run folder; yields the descriptor of the lock. `name` selects the lock, as `SUBMISSION`.

    Jobs inherit the descriptor, so the kernel frees the lock when the launcher AND its job have ended. If a launcher
    was killed, this waits for its job, at most `patience` seconds.

    Raises:
        LockedError: names the process that holds the lock.
    """
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / name, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, run / name, run, time.monotonic() + patience)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


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
    places = ((run / LOCK, SHARED), (own, EXCLUSIVE))
    held: list[int] = []
    deadline = time.monotonic() + patience
    try:
        for file, kind in places:
            held.append(os.open(file, os.O_RDWR | os.O_CREAT, 0o644))
            while not take(held[-1], kind, file):
                if time.monotonic() > deadline:
                    raise LockedError(f"{job.name} of {run} is at work elsewhere: {file} is held")
                time.sleep(0.5)
        yield
    finally:
        for descriptor in held:
            os.close(descriptor)


def _acquire(descriptor: int, file: Path, run: Path, deadline: float) -> None:
    told = False
    while not take(descriptor, EXCLUSIVE, file):
        holder = os.pread(descriptor, 32, 0).decode()
        if not holder or is_alive(int(holder)):
            who = f"another launcher (pid {holder})" if holder else "a Slurm job, or a launcher that has just begun,"
            raise LockedError(f"{who} is at work on {run}; wait for it, stop it, or give another folder with --run")
        if time.monotonic() > deadline:
            raise LockedError(
                f"a job of {run} still runs, in Slurm or left by a launcher (pid {holder}) that was killed: "
                f"`wemmu status {run}` shows which"
            )
        if not told:
            print(f"the launcher before (pid {holder}) was killed; waiting for its job to save and stop", flush=True)
            told = True
        time.sleep(0.1)
