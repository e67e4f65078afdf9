"""Execute a command that gets SIGTERM when the launcher dies.

`python -m launcher.child PARENT_PID COMMAND...`: after a kill -9 of the launcher, no job may continue unnoticed.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Replace this process by `command`, which gets SIGTERM when `parent` dies; a trainer then saves."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            sys.exit("the launcher died before this job began")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
