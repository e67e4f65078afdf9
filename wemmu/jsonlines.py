"""Reads and appends files of one JSON object per line, also after kills and while another process writes."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from wemmu.config.files import naming, replace_text

LEDGER = "ledger.jsonl"


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the complete lines; skip a line that a kill cut short. A missing file has no lines."""
    return new_lines(file, 0)[0]


def new_lines(file: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """Return the complete lines from byte `offset` on, and the offset behind them."""
    try:
        with file.open("rb") as stream:
            stream.seek(offset)
            text = stream.read()
    except OSError:
        return [], offset
    text = text[: text.rfind(b"\n") + 1]
    values = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            values.append(value)
    return values, offset + len(text)


def write_lines(file: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Replace the content of a file atomically."""
    replace_text(file, "".join(json.dumps(line) + "\n" for line in lines))


def append_line(file: Path, values: Mapping[str, Any]) -> None:
    """Add a line, on disk when this returns; one write, so that processes of several nodes may append at once."""
    with naming(file), file.open("ab+") as stream:
        # A line that a kill tore must not swallow this one.
        stream.write((b"\n" if _is_torn(stream) else b"") + json.dumps(values).encode() + b"\n")
        stream.flush()
        os.fsync(stream.fileno())


def _is_torn(stream: BinaryIO) -> bool:
    if stream.seek(0, os.SEEK_END) == 0:
        return False
    stream.seek(-1, os.SEEK_END)
    return stream.read(1) != b"\n"


def append_event(folder: Path, values: Mapping[str, Any]) -> None:
    """Add an event of the stage in `folder` to the launcher's ledger, if a launcher keeps one."""
    home = folder.resolve()
    ledger = home.parent / LEDGER
    if ledger.exists():
        time = datetime.now(UTC).isoformat(timespec="seconds")
        append_line(ledger, {"time": time, "job": home.name, "attempt": 0, **values})


def stage_events(folder: Path) -> list[dict[str, Any]]:
    """Return the ledger's events of the stage in `folder`, its resolutions and its evaluation, oldest first."""
    home = folder.resolve()
    events = read_lines(home.parent / LEDGER)
    return [event for event in events if re.split("[/@]", str(event.get("job", "")))[0] == home.name]
