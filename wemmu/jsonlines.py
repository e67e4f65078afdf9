"""Files of one JSON object a line, as they are after kills and while somebody writes to them."""

import json
import re
from pathlib import Path
from typing import Any


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The whole lines; one that a kill tore is passed over, and in a file that is not there, there are none."""
    return new_lines(file, 0)[0]


def new_lines(file: Path, offset: int) -> tuple[list[dict[str, Any]], int]:
    """The whole lines from byte `offset` on, and the offset behind them; what is still being written is left."""
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


def stage_events(folder: Path) -> list[dict[str, Any]]:
    """What the launcher's ledger tells of the stage in `folder`, its rungs and its evaluation, oldest first."""
    home = folder.resolve()
    events = read_lines(home.parent / "ledger.jsonl")
    return [event for event in events if re.split("[/@]", str(event.get("job", "")))[0] == home.name]
