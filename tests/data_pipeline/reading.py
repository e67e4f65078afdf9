"""Reading a source to its end, and what every source has to keep."""

import json

from data_pipeline.records import RawRecord, Reason, Rejection
from data_pipeline.sources import open_source
from wemmu.config import prepare


def read_all(config: prepare.Source, size: int = 1000) -> list[RawRecord | Rejection]:
    """All that a source gives, part by part; a second source made anew must give the same."""
    source = open_source(config)
    parts = source.parts(size)
    found = [item for part in parts for item in source.read(part)]

    again = open_source(config)
    assert again.parts(size) == parts
    assert [item for part in again.parts(size) for item in again.read(part)] == found

    assert json.loads(json.dumps([part.place for part in parts])) == [part.place for part in parts]
    assert len({part.name for part in parts}) == len(parts)
    keys = [item.key for item in records(found)]
    assert len(set(keys)) == len(keys)
    # Keys, prompts and details go into files.
    assert str(found).encode("utf-8")
    return found


def records(found: list[RawRecord | Rejection]) -> list[RawRecord]:
    return [item for item in found if isinstance(item, RawRecord)]


def reasons(found: list[RawRecord | Rejection]) -> dict[str, Reason]:
    """Key -> reason of what was left out."""
    return {item.key: item.reason for item in found if isinstance(item, Rejection)}
