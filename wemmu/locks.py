"""File locks of the kernel (flock): they end with the processes that hold them, also after a kill."""

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wemmu import batch_job
from wemmu.config.files import naming

SHARED, EXCLUSIVE = fcntl.LOCK_SH, fcntl.LOCK_EX
# How long a lock may outlive the node that held it: a file server waits for a lost client as long (NFS 4: 90 s).
LEASE_S = 180.0


def lease_s() -> float:
    """Return how long one waits for a lock that nobody should hold: in a job, until that of a lost node is released.

    Another job may begin while the file server still keeps the lock of the node.
    """
    return LEASE_S if batch_job.job_id() else 0.0


class LockedError(RuntimeError):
    """A lock that cannot be taken: another process holds it, or the file system has no locks."""


def take(descriptor: int, kind: int, file: Path | str, wait: bool = False) -> bool:
    """Lock the open `file`; returns whether that succeeded, which it always does if this may `wait`.

    Raises:
        LockedError: if the file system has no locks, as Lustre mounted without `flock`.
    """
    try:
        fcntl.flock(descriptor, kind if wait else kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise LockedError(
            f"{file} cannot be locked ({error.strerror}): its file system has no file locks, so two processes "
            "could overwrite each other's files. Use a folder on another file system, or mount this one with locks "
            "(Lustre: the option flock; NFS: a server with its lock service)"
        ) from error
    return True


# Who has a lock: pid, host, slurm_job, since. Empty where nobody has written it down.
Holder = Mapping[str, Any]


@contextmanager
def hold(
    file: Path,
    busy: Callable[[Holder], str],
    kind: int = EXCLUSIVE,
    patience_s: float = 0.0,
    waits_for: Callable[[Holder], bool] = lambda _: True,
) -> Iterator[int]:
    """Lock a file, which is created if need be; yields its descriptor. Processes that inherit it hold the lock as well.

    While another process has the lock, this waits at most `patience_s` seconds, and only if `waits_for` its holder.

    Raises:
        LockedError: with what `busy` says of the holder.
    """
    deadline, printed = time.monotonic() + patience_s, False
    descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not take(descriptor, kind, file):
            holder = _holder(descriptor)
            if time.monotonic() > deadline or not waits_for(holder):
                raise LockedError(busy(holder))
            if not printed:
                print(f"waiting {patience_s:g} s at most: {busy(holder)}", file=sys.stderr, flush=True)
                printed = True
            time.sleep(0.1)
        if kind == EXCLUSIVE:
            said = {"pid": os.getpid(), "host": socket.gethostname(), "slurm_job": batch_job.job_id()}
            with naming(file):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, json.dumps(said | {"since": datetime.now(UTC).isoformat()}).encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> Holder:
    try:
        said = json.loads(os.pread(descriptor, 1000, 0))
    except ValueError:
        # It has just begun.
        return {}
    # A launcher of an earlier version wrote its pid alone.
    return said if isinstance(said, dict) else {"pid": said, "host": socket.gethostname()}


def is_dead(holder: Holder) -> bool:
    """Return whether the process that took the lock has ended, on this host; its children may still have the lock."""
    return holder.get("host") == socket.gethostname() and not is_alive(holder["pid"])


def is_alive(pid: int) -> bool:
    """Return whether a process with this id runs; a zombie does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    try:
        # The state stands after the command's name, which is in brackets and may hold anything.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        # Gone since, or a system without /proc.
        return sys.platform != "linux"
