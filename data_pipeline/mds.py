"""Reads MDS shards without the streaming library: to look and to check, not to train.

Importing streaming takes 20 s, and a check of what it wrote had better not be made by the same code. A shard is: the
number of records (uint32), where each begins and the last ends (uint32), JSON about the writer, then the records. A
record is the length (uint32) of every column that has no fixed one, then the columns. All numbers are little-endian.
Columns come as bytes; nothing in here can run what a shard contains.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from mmap import ACCESS_READ, mmap
from pathlib import Path

import numpy as np

from wemmu.config.shards import COLUMNS, INDEX_FILE, ShardError


@dataclass(frozen=True)
class Shard:
    """A shard as its index has it. `columns` maps names to encodings, `sizes` to bytes (None where they vary)."""

    path: Path
    samples: int
    bytes: int
    columns: dict[str, str]
    sizes: dict[str, int | None]
    # Of compressed shards the records are not read here.
    compression: str | None = None

    @classmethod
    def of_ours(cls, path: Path) -> "Shard":
        """A shard with the columns of our layout, of which nothing but the file is known."""
        # MDSWriter sorts them.
        columns = dict(sorted(COLUMNS.items()))
        return cls(path, 0, 0, columns, dict.fromkeys(columns))

    def records(self) -> Iterator[dict[str, bytes]]:
        """The columns of every record, in order; one record is in memory at a time.

        Raises:
            ShardError: at the first place where the file cannot be what was written.
        """
        with _mapped(self.path) as data:
            offsets = _offsets(self.path, data)
            for begin, end in pairwise(offsets):
                yield self._split(data[begin:end])

    def record(self, number: int) -> dict[str, bytes]:
        with _mapped(self.path) as data:
            offsets = _offsets(self.path, data)
            return self._split(data[offsets[number] : offsets[number + 1]])

    def _split(self, record: bytes) -> dict[str, bytes]:
        varying = [name for name in self.columns if not self.sizes[name]]
        try:
            lengths = np.frombuffer(record, "<u4", len(varying)).tolist()
        except ValueError as error:
            raise ShardError(f"{self.path} has a record of only {len(record)} bytes") from error
        sizes = {**self.sizes, **dict(zip(varying, lengths, strict=True))}
        columns, at = {}, 4 * len(varying)
        for name in self.columns:
            columns[name] = record[at : at + sizes[name]]
            at += sizes[name]
        if at != len(record):
            raise ShardError(f"{self.path} has a record of {len(record)} bytes whose columns take {at}")
        return columns


def read_index(directory: Path) -> list[Shard]:
    """The shards of an MDS data set.

    Raises:
        ShardError: if its index is missing, unreadable, of another version or format, or names a file elsewhere.
    """
    path = directory / INDEX_FILE
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["version"] != 2 or any(shard["format"] != "mds" for shard in index["shards"]):
            raise ShardError(f"{path} is not of version 2 of the format MDS, the only one that this reads")
        return [_shard(directory, shard) for shard in index["shards"]]
    except FileNotFoundError as error:
        raise ShardError(f"{path} is missing") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ShardError):
            raise
        raise ShardError(f"{path} cannot be read as an index of MDS shards: {error!r}") from error


def samples_in_header(path: Path) -> int:
    """The number of records that the shard itself says it has.

    Raises:
        ShardError: if the file is missing, or too short to say so.
    """
    with _mapped(path) as data:
        return len(_offsets(path, data)) - 1


def _shard(directory: Path, entry: dict) -> Shard:
    names = entry["column_names"]
    path = directory / entry["raw_data"]["basename"]
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ShardError(f"{directory / INDEX_FILE} names {entry['raw_data']['basename']}, which lies outside of it")
    return Shard(
        path=path,
        samples=int(entry["samples"]),
        bytes=int(entry["raw_data"]["bytes"]),
        columns=dict(zip(names, entry["column_encodings"], strict=True)),
        sizes=dict(zip(names, entry["column_sizes"], strict=True)),
        compression=entry.get("compression"),
    )


def _mapped(path: Path) -> mmap:
    try:
        with path.open("rb") as file:
            return mmap(file.fileno(), 0, access=ACCESS_READ)
    except FileNotFoundError as error:
        raise ShardError(f"{path} is missing") from error
    except ValueError as error:
        raise ShardError(f"{path} is empty") from error


def _offsets(path: Path, data: mmap) -> list[int]:
    """Where the records begin, and where the last one ends."""
    number = int.from_bytes(data[:4], "little")
    if len(data) < 4 * (number + 2):
        raise ShardError(f"{path} ends within its header")
    offsets = np.frombuffer(data[4 : 4 * (number + 2)], "<u4").astype(np.int64)
    if offsets[-1] != len(data) or (np.diff(offsets, prepend=4 * (number + 2)) < 0).any():
        raise ShardError(f"{path} has {len(data)} bytes, its header speaks of {offsets[-1]}: it is cut off or damaged")
    return offsets.tolist()
