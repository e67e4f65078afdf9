"""Signs of life of this rank for its watcher, and the stacks of all its threads on request."""

import faulthandler
import os
import signal
from pathlib import Path

# Set by the launcher: a file whose modification time is the last sign of life.
VARIABLE = "WEMMU_HEARTBEAT"


def answer_with_stacks() -> None:
    """Make SIGUSR2 write the stacks of all threads to stderr; the process continues."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)


def beat() -> None:
    """Say that this rank gets on: to be called where a rank that hangs would not come."""
    if file := os.environ.get(VARIABLE):
        Path(file).touch()
