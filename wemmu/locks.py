"""Locks of the kernel on files (flock): they end with the processes that hold them, however those end."""

import fcntl
import os
import sys
from pathlib import Path

SHARED, EXCLUSIVE = fcntl.LOCK_SH, fcntl.LOCK_EX


class LockedError(RuntimeError):
    """A lock that cannot be had: somebody else holds it, or the file system has no locks."""


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
            f"{file} cannot be locked ({error.strerror}): its file system has no file locks, so nothing would keep two "
            "processes from destroying each other's work. Use a folder on another file system, or have this one "
            "mounted with them (Lustre: the option flock; NFS: a server with its lock service)"
        ) from error
    return True


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
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        # Gone since, or a system without /proc.
        return sys.platform != "linux"
