"""How an attempt at a job ended, and what follows from that."""

import signal
from collections.abc import Sequence
from typing import Literal

from launcher.job import Job, missing
from launcher.ledger import Event

# Exit codes by which a job says what the launcher cannot know. EX_TEMPFAIL: it was interrupted and has saved its
# state. EX_CONFIG: to run it again would not help. As `timeout` has it: a rank made no step for too long.
SAVED, FINAL, HUNG = 75, 78, 124
# Crashes in a row, none of which came further than the one before, after which a job is given up.
CRASHES = 3

Outcome = Literal["finished", "saved", "crashed", "failed"]


def outcome(job: Job, code: int) -> Outcome:
    """saved: goes on later and nothing is lost. crashed: another attempt may help. failed: none would."""
    if code == 0 and not missing(job):
        return "finished"
    if code == SAVED:
        return "saved"
    # One that says that it did well, and left nothing, would say so again.
    return "failed" if code in (0, FINAL) else "crashed"


def reason(job: Job, code: int) -> str:
    """Why an attempt ended, as the end of a sentence that begins with the job's name."""
    if code == 0 and not missing(job):
        return "finished"
    if code == 0:
        return f"exited well but left no whole {', '.join(map(str, missing(job)))}"
    if code == SAVED:
        return "was interrupted and saved its state"
    if code == FINAL:
        return "failed for good: to run it again would not help"
    if code == HUNG:
        return "failed: a rank made no step for too long; the stacks of all ranks are in its log"
    # A shell and srun add 128 to the number of a signal.
    number = -code if code < 0 else code - 128
    if number == signal.SIGKILL:
        return "failed: killed by SIGKILL, by somebody or because memory ran out"
    if number in signal.valid_signals() and number > 0:
        return f"failed: killed by {signal.Signals(number).name}"
    return f"failed with exit code {code}"


def crashes(events: Sequence[Event]) -> int:
    """Crashes of a job since an attempt last came further than the one before it.

    What was interrupted and saved its state is no crash, and does not excuse the crashes before it.
    """
    count = 0
    for event in reversed(events):
        # Submitted again, by a person who may have mended something, it has all its tries; also after it was given up.
        if event.event in ("submitted", "refused"):
            break
        if event.event != "ended":
            continue
        if event.outcome == "finished" or (event.to_step or 0) > (event.from_step or 0):
            break
        count += event.outcome == "crashed"
    return count
