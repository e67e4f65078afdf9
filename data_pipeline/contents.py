"""Reads the state and the records of a data set, complete or not."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.ledger import Ledger, streams_of
from data_pipeline.plan import Settings
from wemmu.config.neighbours import instead
from wemmu.config.shards import (
    DATASET_FILE,
    INDEX_FILE,
    SETTINGS_FILE,
    DataSet,
    ShardError,
    StoredRecord,
    Stream,
    written_anew,
)
from wemmu.mds import Shard


@dataclass(frozen=True)
class Contents:
    """A data set of layout 2 with `finished` of its `parts` partitions; `streams` are those of the finished ones."""

    root: Path
    streams: tuple[Stream, ...]
    finished: int
    parts: int
    complete: bool


def look(root: Path) -> Contents:
    """Read the state of `root`. An unfinished data set has its streams from the ledger, without an index.

    Raises:
        ShardError: if `root` holds no data set, or one of another version.
    """
    try:
        parts = Settings.load(root / SETTINGS_FILE).parts
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ShardError(
            f"{root} contains no data set: it has no {SETTINGS_FILE}{instead(root, 'shards')}. Write one with "
            "`wemmu data write CURRICULUM`"
        ) from error
    if (root / DATASET_FILE).exists():
        return Contents(root, DataSet.at(root).streams, parts, parts, complete=True)
    entries = list(Ledger(root).entries(parts))
    streams = tuple(stream for stream, _ in streams_of(entries))
    return Contents(root, streams, len(entries), parts, complete=False)


def shard_files(stream: Stream) -> list[str]:
    """Return the stream's shards, relative to its directory, in index order."""
    return [name for name in stream.files if name != INDEX_FILE]


def records(root: Path, stream: Stream) -> Iterator[StoredRecord]:
    """Yield the records of a stream, in order; raises ShardError where a shard is missing or damaged."""
    for name in shard_files(stream):
        path = root / stream.settings.name / name
        try:
            yield from map(StoredRecord.of, Shard.of_ours(path).records())
        except (FileNotFoundError, ValueError) as error:
            what = f"{path} is missing" if isinstance(error, FileNotFoundError) else str(error)
            named = what if str(path) in what else f"{path}: {what}"
            raise ShardError(f"{named}; {written_anew(root, stream.settings.name, name)}") from error
