"""The history of a run folder: one JSON line per event, only ever appended to.

What is finished is decided by the products of the jobs (`launcher.job`); the ledger tells people what happened.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, Literal


@dataclass(frozen=True)
class Event:
    """Start or end of one attempt at a job.

    pid: of the job's process. exit_code: negative if a signal ended it. from_step, to_step: newest checkpoint of a
    training job before and after. reason: why it ended, in words.
    """

    job: str
    attempt: int
    event: Literal["started", "ended"]
    pid: int
    exit_code: int | None = None
    from_step: int | None = None
    to_step: int | None = None
    reason: str = ""
    time: str = ""


class Ledger:
    """The file `ledger.jsonl` of a run folder."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def append(self, event: Event) -> None:
        """Add an event, stamped with the time; on disk when this returns."""
        said = {"time": ""} | asdict(event) | {"time": datetime.now(UTC).isoformat(timespec="seconds")}
        line = json.dumps({key: value for key, value in said.items() if value not in (None, "")})
        with self.file.open("ab+") as file:
            # A line that a kill tore must not swallow this one.
            file.write((b"\n" if _is_torn(file) else b"") + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def events(self) -> Iterator[Event]:
        """All events, oldest first; lines torn by a kill are passed over."""
        if not self.file.exists():
            return
        for line in self.file.read_text(errors="replace").splitlines():
            try:
                yield Event(**json.loads(line))
            except (ValueError, TypeError):
                continue

    def of(self, job: str) -> list[Event]:
        """The events of one job, oldest first."""
        return [event for event in self.events() if event.job == job]


def _is_torn(file: BinaryIO) -> bool:
    if file.seek(0, os.SEEK_END) == 0:
        return False
    file.seek(-1, os.SEEK_END)
    return file.read(1) != b"\n"
