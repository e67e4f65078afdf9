"""The history of a run folder: one JSON line per event, only ever appended to.

The products of a job decide whether it is finished (`launcher.job`). The ledger shows people what happened, and the
launcher how often.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from wemmu.jsonlines import append_line, read_lines

Happening = Literal["submitted", "started", "ended", "refused", "warned", "requeued", "cancelled", "changed"]


@dataclass(frozen=True)
class Event:
    """One line of the ledger.

    event: submitted (to Slurm); started, ended (an attempt); refused (the gate does not hold, or too many crashes);
    warned (Slurm announced the end); requeued; cancelled; changed (training found another config than the last
    attempt's). attempt: counted from 1; 0 for events that do not belong to an attempt. pid, host: the process. slurm:
    id of the Slurm job. nodes: its nodes. exit_code: negative if a signal ended it. from_step, to_step: newest
    checkpoint of a training job before and after. outcome: see `launcher.ending`. reason: in words.
    """

    job: str
    attempt: int
    event: Happening
    pid: int | None = None
    exit_code: int | None = None
    from_step: int | None = None
    to_step: int | None = None
    reason: str = ""
    outcome: str = ""
    slurm: int | None = None
    nodes: str = ""
    host: str = ""
    time: str = ""


class Ledger:
    """The file `ledger.jsonl` of a run folder."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, event: Event) -> None:
        """Add an event, stamped with the time; on disk when this returns."""
        said = {"time": ""} | asdict(event) | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        append_line(self.file, {key: value for key, value in said.items() if value not in (None, "")})

    def events(self) -> Iterator[Event]:
        """Yield all events, oldest first; skip lines that a kill truncated."""
        for line in read_lines(self.file):
            # Another version may have other fields.
            with suppress(TypeError):
                yield Event(**line)

    def of(self, job: str) -> list[Event]:
        """Return the events of one job, oldest first."""
        return [event for event in self.events() if event.job == job]

    def attempts(self, job: str) -> int:
        """Return how often a job was started."""
        return sum(event.event == "started" for event in self.of(job))
