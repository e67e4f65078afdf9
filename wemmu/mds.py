"""Reads MDS shards: the one reader of training, of `wemmu data inspect` and of `wemmu data verify`.

Shards are written by mosaicml-streaming's MDSWriter, but not read by its MDSReader. That one takes twice as long for a
record, does not notice damage (a wrong offset gives another record's bytes, or an IndexError without the file's name),
opens pickles, and takes seconds to import. Here columns come as bytes, and nothing can run what a shard contains.

A shard is: the number of records (uint32), where each begins and the last ends (uint32), JSON about the writer, the
records. A record is: the length (uint32) of every column that has no fixed one, then the columns. All numbers are
little-endian.
"""

import io
import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from wemmu.config.shards import COLUMNS, INDEX_FILE, ShardError


class BrokenShardError(ShardError):
    """A damaged shard file; `reason` says why, without the path."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} {reason}")
        self.reason = reason


@dataclass(frozen=True)
class Shard:
    """A shard as its index describes it. `columns` maps names to encodings, `sizes` to bytes (None where they vary)."""

    path: Path
    samples: int
    bytes: int
    columns: dict[str, str]
    sizes: dict[str, int | None]
    # Records of compressed shards cannot be read here.
    compression: str | None = None

    @classmethod
    def of_ours(cls, path: Path) -> "Shard":
        """Return a shard with the columns of our layout, given only its file."""
        # MDSWriter sorts them.
        columns = dict(sorted(COLUMNS.items()))
        return cls(path, 0, 0, columns, dict.fromkeys(columns))

    @property
    def is_ours(self) -> bool:
        return list(self.columns.items()) == sorted(COLUMNS.items()) and not self.compression

    def opened(self) -> io.FileIO:
        """Raise BrokenShardError if it is a folder, or a pipe or device, which may never end; FileNotFoundError."""
        if self.path.exists() and not self.path.is_file():
            raise BrokenShardError(self.path, "is not a file")
        return self.path.open("rb", buffering=0)

    def records(self) -> Iterator[dict[str, memoryview]]:
        """Yield the columns of every record, in order; one record is in memory at a time.

        Raises:
            BrokenShardError: at the first place where the file cannot be what was written.
        """
        with self.opened() as file:
            for begin, end in pairwise(self._offsets(file.fileno())):
                yield self._columns(file.fileno(), begin, end)

    def record(self, number: int) -> dict[str, memoryview]:
        """Return the columns of one record, reading no other; raises BrokenShardError, FileNotFoundError."""
        with self.path.open("rb", buffering=0) as file:
            offsets = os.pread(file.fileno(), 8, 4 * (1 + number))
            if len(offsets) < 8:
                raise BrokenShardError(self.path, "ends within its header")
            return self._columns(file.fileno(), *struct.unpack("<2I", offsets))

    def header_samples(self) -> int:
        """Return the number of records in the shard's header; raises BrokenShardError, FileNotFoundError."""
        with self.opened() as file:
            return len(self._offsets(file.fileno())) - 1

    def _offsets(self, file: int) -> tuple[int, ...]:
        """Where the records begin, and where the last one ends."""
        size = os.fstat(file).st_size
        if not size:
            raise BrokenShardError(self.path, "is empty")
        number = int.from_bytes(os.pread(file, 4, 0), "little")
        if size < 4 * (number + 2):
            raise BrokenShardError(self.path, "ends within its header")
        offsets = struct.unpack(f"<{number + 1}I", os.pread(file, 4 * (number + 1), 4))
        if offsets[-1] != size or any(end < begin for begin, end in pairwise((4 * (number + 2), *offsets))):
            said = f"has {size} bytes, its header speaks of {offsets[-1]}: it is cut off or damaged"
            raise BrokenShardError(self.path, said)
        return offsets

    def _columns(self, file: int, begin: int, end: int) -> dict[str, memoryview]:
        """Views of one buffer that can be written to: torch warns of reading an image from any other."""
        size = os.fstat(file).st_size
        varying = [name for name in self.columns if not self.sizes[name]]
        if not begin + 4 * len(varying) <= end <= size:
            raise BrokenShardError(self.path, f"has a record that begins at {begin} and ends at {end} of {size} bytes")
        record = memoryview(bytearray(end - begin))
        os.preadv(file, [record], begin)
        sizes = {**self.sizes, **dict(zip(varying, struct.unpack_from(f"<{len(varying)}I", record), strict=True))}
        columns, at = {}, 4 * len(varying)
        for name in self.columns:
            columns[name] = record[at : at + sizes[name]]
            at += sizes[name]
        # A damaged offset of another record can lead to the whole of this one.
        if at != len(record):
            raise BrokenShardError(self.path, f"has a record of {len(record)} bytes whose columns take {at}")
        return columns


def read_index(directory: Path) -> list[Shard]:
    """Return the shards of an MDS data set; raises ShardError as `shards_of`, or if it has no index."""
    path = directory / INDEX_FILE
    try:
        return shards_of(path.read_bytes(), directory)
    except FileNotFoundError as error:
        raise ShardError(f"{path} is missing") from error


def shards_of(index: bytes, directory: Path) -> list[Shard]:
    """Return the shards that the index of the MDS data set in `directory` lists.

    Raises:
        ShardError: if the index is unreadable, of another version or format, or names a file elsewhere.
    """
    path = directory / INDEX_FILE
    try:
        tree = json.loads(index)
        if tree["version"] != 2 or any(shard["format"] != "mds" for shard in tree["shards"]):
            raise ShardError(f"{path} is not MDS version 2, the only version that can be read")
        return [_shard(directory, shard) for shard in tree["shards"]]
    except ShardError:
        raise
    except (ValueError, KeyError, TypeError, OverflowError, RuntimeError) as error:
        raise ShardError(f"{path} cannot be read as an index of MDS shards: {error!r}") from error


def _shard(directory: Path, entry: dict[str, Any]) -> Shard:
    names, raw = [str(name) for name in entry["column_names"]], entry["raw_data"]
    sizes = [None if size is None else int(size) for size in entry["column_sizes"]]
    path = directory / raw["basename"]
    if not path.resolve().is_relative_to(directory.resolve()):
        raise ShardError(f"{directory / INDEX_FILE} names {raw['basename']}, which lies outside of it")
    return Shard(
        path=path,
        samples=int(entry["samples"]),
        bytes=int(raw["bytes"]),
        columns=dict(zip(names, map(str, entry["column_encodings"]), strict=True)),
        sizes=dict(zip(names, sizes, strict=True)),
        compression=entry.get("compression"),
    )
