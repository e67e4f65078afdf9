"""What a directory holds of a data set, complete or not, and the records in it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.ledger import Ledger, streams_of
from data_pipeline.plan import Settings
from wemmu.config.shards import DATASET_FILE, INDEX_FILE, SETTINGS_FILE, DataSet, ShardError, StoredRecord, Stream
from wemmu.mds import Shard


@dataclass(frozen=True)
class Contents:
    """A data set of layout 2. `finished` of its `parts` partitions are written; the streams hold those."""

    root: Path
    streams: tuple[Stream, ...]
    finished: int
    parts: int
    complete: bool


def look(root: Path) -> Contents:
    """What is in `root`. Without its record, the streams are those of the ledger, whose index is not written yet.

    Raises:
        ShardError: if it was never begun, or is of another version.
    """
    try:
        parts = Settings.load(root / SETTINGS_FILE).parts
    except FileNotFoundError as error:
        raise ShardError(
            f"{root} holds no data set: it has no {SETTINGS_FILE}. `wemmu data write CURRICULUM` makes one"
        ) from error
    if (root / DATASET_FILE).exists():
        return Contents(root, DataSet.at(root).streams, parts, parts, complete=True)
    entries = list(Ledger(root).entries(parts))
    streams = tuple(stream for stream, _ in streams_of(entries))
    return Contents(root, streams, len(entries), parts, complete=False)


def shard_files(stream: Stream) -> list[str]:
    """The stream's shards, relative to its directory, in the order of the index."""
    return [name for name in stream.files if name != INDEX_FILE]


def records(root: Path, stream: Stream) -> Iterator[StoredRecord]:
    """The records of a stream, in order."""
    for name in shard_files(stream):
        for columns in Shard.of_ours(root / stream.settings.name / name).records():
            yield StoredRecord.of(columns)
