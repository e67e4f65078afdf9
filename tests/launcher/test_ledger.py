"""The ledger keeps every event that was written whole."""

import json
from pathlib import Path

import pytest

from launcher.ledger import Event, Ledger

STARTED = Event("stage1", 1, "started", 7, from_step=0)
ENDED = Event("stage1", 1, "ended", 7, exit_code=75, from_step=0, to_step=40, reason="was interrupted")


def without_time(events: list[Event]) -> list[Event]:
    return [Event(**(vars(event) | {"time": ""})) for event in events]


def test_events_come_back_as_they_went_in_with_their_time(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    assert list(ledger.events()) == []
    ledger.append(STARTED)
    ledger.append(ENDED)
    assert without_time(list(ledger.events())) == [STARTED, ENDED]
    assert all(event.time.endswith("+00:00") for event in ledger.events())


@pytest.mark.parametrize("keep", range(1, 60, 7))
def test_a_line_torn_anywhere_costs_only_itself(tmp_path: Path, keep: int):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(STARTED)
    whole = ledger.file.read_bytes()
    ledger.file.write_bytes(whole + whole[:keep])
    assert without_time(list(ledger.events())) == [STARTED]
    ledger.append(ENDED)
    assert without_time(list(ledger.events())) == [STARTED, ENDED]


def test_a_whole_line_without_its_newline_is_kept(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(STARTED)
    ledger.file.write_bytes(ledger.file.read_bytes()[:-1])
    ledger.append(ENDED)
    assert without_time(list(ledger.events())) == [STARTED, ENDED]


def test_a_line_says_only_what_is_known(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(Event("report", 2, "started", 7))
    line = json.loads(ledger.file.read_text())
    assert set(line) == {"time", "job", "attempt", "event", "pid"}


def test_the_events_of_one_job_are_its_own(tmp_path: Path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(STARTED)
    ledger.append(Event("stage10", 1, "started", 8))
    assert [event.pid for event in ledger.of("stage1")] == [7]
