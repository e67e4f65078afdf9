"""Allows one training at a time in a stage folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from wemmu.checkpoint.collective import all_ranks
from wemmu.locks import Holder, hold, is_dead

FILE = "trainer.lock"
# Seconds for which the lock may outlive a rank that was killed: processes of its loader share it and notice late.
PATIENCE_S = 30.0


@contextmanager
def held(folder: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Hold `folder` for the ranks of this run, by a lock of the first of them; all ranks call it.

    Raises:
        LockedError, CheckpointError: naming the process that trains there. On all ranks.
    """

    def busy(holder: Holder) -> str:
        return f"{folder} is being trained in by another process ({_described(holder)}); wait for it or stop it first"

    with ExitStack() as stack:
        lock = hold(folder / FILE, busy, patience_s=patience_s, waits_for=lambda holder: not holder or is_dead(holder))
        all_ranks().together(f"{folder} cannot be trained in", lambda: None, lambda _: stack.enter_context(lock))
        yield


def _described(holder: Holder) -> str:
    words = {"pid": "pid", "host": "on", "slurm_job": "of Slurm job", "since": "since"}
    return " ".join(f"{word} {holder[key]}" for key, word in words.items() if holder.get(key) is not None) or "unknown"
