"""One training at a time in a stage folder, whoever started it."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from wemmu.checkpoint.collective import all_ranks
from wemmu.locks import EXCLUSIVE, LockedError, is_alive, take

FILE = "trainer.lock"
# Seconds for which the lock may outlive a rank that was killed: processes of its loader share it and notice late.
PATIENCE_S = 30.0


@contextmanager
def held(folder: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold `folder` for the ranks of this run, by a lock of the first of them; all ranks call it.

    Raises:
        LockedError, CheckpointError: naming the process that trains there. On all ranks.
    """
    descriptors: list[int] = []

    def lock(_: list[None]) -> None:
        descriptors.append(os.open(folder / FILE, os.O_RDWR | os.O_CREAT, 0o644))
        _acquire(descriptors[0], folder, time.monotonic() + patience_s)
        said = {"pid": os.getpid(), "host": socket.gethostname(), "slurm_job": os.environ.get("SLURM_JOB_ID")}
        os.ftruncate(descriptors[0], 0)
        os.pwrite(descriptors[0], json.dumps(said | {"since": datetime.now(UTC).isoformat()}).encode(), 0)

    try:
        all_ranks().together(f"{folder} cannot be trained in", lambda: None, lock)
        yield
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def _acquire(descriptor: int, folder: Path, deadline: float) -> None:
    while not take(descriptor, EXCLUSIVE, folder / FILE):
        try:
            holder = json.loads(os.pread(descriptor, 1000, 0))
        except ValueError:
            # It has just begun.
            holder = {}
        dead = holder.get("host") == socket.gethostname() and not is_alive(holder["pid"])
        if (holder and not dead) or time.monotonic() > deadline:
            raise LockedError(
                f"{folder} is being trained in by another process ({_told(holder)}); wait for it or stop it first"
            )
        time.sleep(0.1)


def _told(holder: dict[str, str | int | None]) -> str:
    words = {"pid": "pid", "host": "on", "slurm_job": "of Slurm job", "since": "since"}
    return " ".join(f"{word} {holder[key]}" for key, word in words.items() if holder.get(key) is not None) or "unknown"
