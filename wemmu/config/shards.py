"""The layout of a prepared data set: what `data_pipeline` writes and `wemmu.data` reads.

dataset.json                    written last: where it stands, the data set is complete
<task>/<resolution>/<H>x<W>/    one stream, a local MDS data set
    stream.json                 its settings, written first
    index.json                  the MDS index of all its partitions
    00000/ 00001/ ...           its partitions, each written aside and moved here when finished
"""

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from wemmu.config.task import Task

VERSION = 1
DATASET_FILE = "dataset.json"
STREAM_FILE = "stream.json"
INDEX_FILE = "index.json"
# MDS types that decode without executing anything. `images` holds the input pictures (see `pack`), `target` the picture
# to make; both as PNG. An empty `target` means that the first input picture is itself the target.
COLUMNS = {"id": "str", "task": "str", "prompt": "str", "images": "bytes", "target": "bytes"}

Positive = Annotated[int, Field(gt=0)]


class ShardError(ValueError):
    """A data set that cannot be used as it is; the message names the file or field and the way out."""


class _Schema(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises FileNotFoundError without the file, ShardError for one that this version cannot read."""
        try:
            return cls.model_validate_json(path.read_text())
        except ValidationError as error:
            raise ShardError(
                f"{path} is not of this version of the shard layout; write the data set anew into an empty directory "
                f"({error.errors()[0]['loc']}: {error.errors()[0]['msg']})"
            ) from error

    def save(self, path: Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        replace_text(path, self.model_dump_json(indent=1))


class StreamSettings(_Schema):
    """Everything that decides the content of one stream: equal settings, equal records.

    `height` and `width` are in pixels, `samples` and `partition` (records per partition) in records.
    """

    source: str
    source_version: int
    seed: int
    task: Task
    resolution: Positive
    height: Positive
    width: Positive
    samples: Positive
    partition: Positive

    @property
    def name(self) -> str:
        """The stream's directory below the data set's."""
        return f"{self.task}/{self.resolution}/{self.height}x{self.width}"

    @property
    def partitions(self) -> int:
        return -(-self.samples // self.partition)

    def records(self, partition: int) -> range:
        """The numbers of the records in partition number `partition`."""
        start = partition * self.partition
        return range(start, min(start + self.partition, self.samples))

    def differences(self, other: "StreamSettings") -> list[str]:
        """One `field: own value, other value` for each field in which the two differ."""
        mine, theirs = self.model_dump(mode="json"), other.model_dump(mode="json")
        return [f"{field}: {mine[field]}, not {theirs[field]}" for field in mine if mine[field] != theirs[field]]


class Stream(_Schema):
    """A finished stream. `files` maps each file, its index included, to its sha256; `bytes` counts the shards."""

    settings: StreamSettings
    bytes: int
    files: dict[str, str]


class DataSet(_Schema):
    """The record of a complete data set, `dataset.json`."""

    version: Annotated[int, Field(ge=VERSION, le=VERSION)] = VERSION
    streams: tuple[Stream, ...]

    @classmethod
    def at(cls, root: Path) -> Self:
        """Read the record of the data set in `root`.

        Raises:
            ShardError: if `root` holds no complete data set.
        """
        try:
            return cls.load(root / DATASET_FILE)
        except FileNotFoundError as error:
            raise ShardError(
                f"{root} holds no complete data set (it has no {DATASET_FILE}); `python -m data_pipeline write "
                "CURRICULUM.yaml` makes or finishes it"
            ) from error


def replace_text(path: Path, text: str) -> None:
    """Give `path` this content in one atomic step."""
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(text)
    os.replace(aside, path)


def pack(parts: Sequence[bytes]) -> bytes:
    """Any number of byte strings as one: their number, their lengths (uint32, little-endian), then their content."""
    return struct.pack(f"<{1 + len(parts)}I", len(parts), *map(len, parts)) + b"".join(parts)


def unpack(data: bytes) -> list[bytes]:
    """The inverse of `pack`."""
    (number,) = struct.unpack_from("<I", data)
    parts, offset = [], 4 * (1 + number)
    for length in struct.unpack_from(f"<{number}I", data, 4):
        parts.append(data[offset : offset + length])
        offset += length
    return parts
