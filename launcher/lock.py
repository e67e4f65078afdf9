"""One launcher at a time on a run folder."""

import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# How long a job may take to save its state after its launcher was killed.
PATIENCE_S = 60.0


class LockedError(RuntimeError):
    """Somebody else works on the run folder."""


@contextmanager
def locked(run: Path, patience: float = PATIENCE_S) -> Iterator[int]:
    """Hold the run folder; yields the descriptor of the lock.

    The descriptor is handed on to the jobs, so the kernel frees the lock when the launcher AND its job are gone,
    however they went. A job whose launcher was killed is waited for, `patience` seconds at most.

    Raises:
        LockedError: naming the process that holds the folder.
    """
    run.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(run / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _acquire(descriptor, run, time.monotonic() + patience)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, str(os.getpid()).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, run: Path, deadline: float) -> None:
    told = False
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode()
        if not holder or is_alive(int(holder)):
            raise LockedError(
                f"another launcher (pid {holder or 'not yet known'}) is at work on {run}; wait for it, stop it, or "
                "give another folder with --out"
            ) from None
        if time.monotonic() > deadline:
            raise LockedError(
                f"the launcher (pid {holder}) of {run} was killed and a job of it still runs: "
                f"`python -m launcher status {run}` tells which"
            ) from None
        if not told:
            print(f"the launcher before (pid {holder}) was killed; waiting for its job to save and stop", flush=True)
            told = True
        time.sleep(0.1)


def is_alive(pid: int) -> bool:
    """Whether a process of this id runs. One that is dead, but that nobody has waited for yet, does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        # The state stands after the command's name, which is in brackets and may hold anything.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        # Gone since, or a system without /proc.
        return sys.platform != "linux"
