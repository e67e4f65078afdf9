"""Finds the commit of this code."""

import subprocess
from pathlib import Path
from typing import NamedTuple

_PATIENCE_S = 10.0


class Revision(NamedTuple):
    """commit: its full hash. dirty: whether tracked files differ from it."""

    commit: str
    dirty: bool


def revision() -> Revision | None:
    """Return the revision of this checkout; None outside of a checkout, without git, or if git does not answer."""

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        # `status` would take a lock; several ranks and people may call git at once.
        command = ["git", "--no-optional-locks", *arguments]
        done = subprocess.run(
            command, cwd=here, capture_output=True, encoding="utf-8", errors="replace", check=True, timeout=_PATIENCE_S
        )
        return done.stdout.strip()

    try:
        if git("ls-files", Path(__file__).name) != Path(__file__).name:
            return None  # installed into somebody else's repository
        return Revision(git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no")))
    except (OSError, subprocess.SubprocessError):
        return None
