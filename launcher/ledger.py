"""The history of a run folder: one JSON line per event, only ever appended to.

What is finished is decided by the products of the jobs (`launcher.job`); the ledger tells people what happened, and the
launcher how often.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from wemmu.jsonlines import append_line

Happening = Literal["submitted", "started", "ended", "refused", "warned", "requeued", "cancelled", "changed"]


@dataclass(frozen=True)
class Event:
    """submitted: to Slurm. started, ended: one attempt at a job. refused: its gate did not hold, or it is
    given up. warned: told by Slurm that it will end. requeued, cancelled. changed: the config differs from the last
    attempt's; training writes it.

    attempt: counted from 1, 0 where it is no attempt that is told of. pid, host: of the process that ran it. slurm: the
    id of its Slurm job, nodes: those it ran on. exit_code: negative if a signal ended it. from_step, to_step: newest
    checkpoint of a training job before and after. outcome: see `launcher.ending`. reason: why, in words.
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
        """All events, oldest first; lines torn by a kill are passed over."""
        if not self.file.exists():
            return
        for line in self.file.read_text(errors="replace", encoding="utf-8").splitlines():
            try:
                yield Event(**json.loads(line))
            except (ValueError, TypeError):
                continue

    def of(self, job: str) -> list[Event]:
        """The events of one job, oldest first."""
        return [event for event in self.events() if event.job == job]

    def attempts(self, job: str) -> int:
        """How often a job was started."""
        return sum(event.event == "started" for event in self.of(job))
