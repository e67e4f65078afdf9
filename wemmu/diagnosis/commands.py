"""Runs other programs with a time limit."""

import os
import signal
import subprocess
from collections.abc import Sequence


def answer(command: Sequence[str], timeout_s: float) -> tuple[int, str]:
    """Run a program without input; return its exit code, and its standard output and standard error.

    Raises:
        TimeoutError: if it has not ended in time; then it and all that it started are killed.
        OSError: if it cannot be started.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        # A group of its own: a child left alive would hold the pipe, and the wait for its end with it.
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise TimeoutError(f"{command[0]} did not answer within {timeout_s:g} s") from None
        raise
    return process.returncode, output.strip()
