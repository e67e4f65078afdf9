"""Classifies how an attempt at a job ended, which decides what the launcher does next."""

import signal
from collections.abc import Sequence
from typing import Literal

from launcher.job import Job, missing
from launcher.ledger import Event
from wemmu.command_line import FINAL, HUNG, SAVED

# A job fails after this many crashes in a row without progress.
CRASHES = 3

Outcome = Literal["finished", "saved", "crashed", "failed"]


def ending(job: Job, code: int) -> tuple[Outcome, str]:
    """Classify the end of an attempt, and say why, as the rest of a sentence that begins with the job's name.

    saved: resumes, nothing is lost. crashed: another attempt may succeed. failed: none can.
    """
    if code == 0:
        # Without products another attempt would do the same.
        lacking = ", ".join(map(str, missing(job)))
        return (
            ("failed", f"exited with code 0 but wrote no complete {lacking}") if lacking else ("finished", "finished")
        )
    if code == SAVED:
        return "saved", "was interrupted and saved its state"
    if code == FINAL:
        return "failed", "failed: another attempt would fail in the same way"
    if code == HUNG:
        return "crashed", "failed: a rank made no step for too long; the stacks of all ranks are in its log"
    # A shell and srun add 128 to the number of a signal.
    number = -code if code < 0 else code - 128
    if number == signal.SIGKILL:
        return "crashed", "failed: killed by SIGKILL, by a person or because memory ran out"
    if number in signal.valid_signals() and number > 0:
        return "crashed", f"failed: killed by {signal.Signals(number).name}"
    return "crashed", f"failed with exit code {code}"


def crashes(events: Sequence[Event]) -> int:
    """Count the crashes of a job since its last progress.

    An interrupted attempt that saved its state is not a crash and does not reset the count.
    """
    count = 0
    for event in reversed(events):
        # A person submitted it again and may have fixed the cause: all attempts count anew.
        if event.event in ("submitted", "refused"):
            break
        if event.event != "ended":
            continue
        if event.outcome == "finished" or (event.to_step or 0) > (event.from_step or 0):
            break
        count += event.outcome == "crashed"
    return count
