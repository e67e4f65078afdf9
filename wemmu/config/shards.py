"""The layout of a prepared data set: what `data_pipeline` writes and `wemmu.data` reads (docs/data.md).

settings.json                   what was asked for, written first
ledger/00000.json ...           one finished partition each: what it holds in which stream, what it rejected
scan/00000.npy ...              hashes of the records of each partition, where duplicates were looked for
rejected.jsonl                  every record that was left out, with its source, key and reason
<task>/<resolution>/<H>x<W>/    one stream, a local MDS data set
    index.json                  the MDS index of all its partitions
    00000/ 00001/ ...           the shards of its partitions
dataset.json                    written last: where it stands, the data set is complete
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import xxhash
from pydantic import Field, ValidationError

from wemmu.config.base import Config, Positive
from wemmu.config.files import replace_text
from wemmu.config.task import Task

VERSION = 2
DATASET_FILE = "dataset.json"
SETTINGS_FILE = "settings.json"
INDEX_FILE = "index.json"
REJECTED_FILE = "rejected.jsonl"
LEDGER = "ledger"
SCAN = "scan"
REWRITE = "run `wemmu data write CURRICULUM` again"
# MDS types that decode without executing anything.
#   prompt    what the VLM is asked; empty where the task has no words
#   answer    what it should say; understanding only
#   images    the input pictures as files (JPEG or PNG), see `pack`
#   target    the picture to make as a file; empty where the first input is itself the target, or none is made
#   latents   empty, or see `pack`: the latents of the target, then of each input, each [channels, rows, columns]
#   checksum  of all other columns, see `checksum`; readers compare it, so that damage never becomes wrong pixels
COLUMNS = {
    "id": "str",
    "task": "str",
    "prompt": "str",
    "answer": "str",
    "images": "bytes",
    "target": "bytes",
    "latents": "bytes",
    "checksum": "bytes",
}


class ShardError(ValueError):
    """A data set that cannot be used as it is; the message names the file or field and the way out."""


class Schema(Config):
    """A JSON file of the data set."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises FileNotFoundError without the file, ShardError for one that this version cannot read."""
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise ShardError(
                f"{path} is not of this version of the shard layout; write the data set anew into an empty directory "
                f"({error.errors()[0]['loc']}: {error.errors()[0]['msg']})"
            ) from error

    def save(self, path: Path) -> None:
        """Write as JSON; the file appears whole or not at all."""
        replace_text(path, self.model_dump_json(indent=1))


class LatentSettings(Schema):
    """Everything that decides what a stored latent is; training refuses latents of another autoencoder.

    `vae` names its weights (`wemmu.published.identity`). Values are already multiplied by `scaling_factor`.
    """

    vae: str
    scaling_factor: float
    dtype: Literal["float32", "bfloat16"]
    channels: Positive
    rows: Positive
    columns: Positive

    @property
    def bytes(self) -> int:
        """Of one image's latents."""
        return self.channels * self.rows * self.columns * {"float32": 4, "bfloat16": 2}[self.dtype]


class StreamSettings(Schema):
    """What the records of one stream have in common, so that any of them can share a batch.

    `height` and `width` are the pixels of every picture, `inputs` is the number of input pictures of a record.
    """

    task: Task
    resolution: Positive
    height: Positive
    width: Positive
    inputs: Annotated[int, Field(ge=0)]
    latents: LatentSettings | None = None

    @property
    def name(self) -> str:
        """The stream's directory below the data set's."""
        several = f"x{self.inputs}" if self.task is Task.MULTI_EDIT else ""
        return f"{self.task}/{self.resolution}/{self.height}x{self.width}{several}"


class Stream(Schema):
    """A finished stream. `files` maps each file, its index included, to its sha256; `bytes` counts the shards."""

    settings: StreamSettings
    samples: Positive
    bytes: int
    files: dict[str, str]


class DataSet(Schema):
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
                f"{root} holds no complete data set (it has no {DATASET_FILE}); `wemmu data write "
                "CURRICULUM` makes or finishes it"
            ) from error


def written_anew(root: Path | str, stream: str, name: str) -> str:
    """How to have the partition of shard file `name` of a stream written anew in the data set at `root`, or a URL."""
    partition = name.split("/")[0]
    parts = f"{stream}/{partition}", f"{LEDGER}/{partition}.json", DATASET_FILE
    return f"to have it written anew, delete {', '.join(f'{root}/{part}' for part in parts)} and {REWRITE}"


def checksum(columns: Mapping[str, Any]) -> bytes:
    """8 bytes that change when any other column does."""
    digest = xxhash.xxh3_64()
    for name in COLUMNS:
        if name != "checksum":
            value = columns[name]
            data = value.encode() if isinstance(value, str) else value
            digest.update(struct.pack("<Q", len(data)))
            digest.update(data)
    return digest.digest()


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


@dataclass(frozen=True)
class StoredRecord:
    """A record as it is stored, with its lists unpacked: images are files, and latents numbers of one image each.

    Binary fields are of the type that the columns have, which may be views of the shard.
    """

    id: str
    task: Task
    prompt: str
    answer: str
    images: list[bytes]
    target: bytes
    latents: list[bytes]

    @classmethod
    def of(cls, columns: Mapping[str, bytes]) -> Self:
        """The record of these columns.

        Raises:
            ValueError: if they are damaged, or not of this layout.
        """
        if checksum(columns) != columns["checksum"]:
            raise ValueError("its checksum differs: it is damaged")
        try:
            id, task, prompt, answer = (str(columns[name], "utf-8") for name in ("id", "task", "prompt", "answer"))
            images, latents = (unpack(columns[name]) if columns[name] else [] for name in ("images", "latents"))
            return cls(id, Task(task), prompt, answer, images, columns["target"], latents)
        except (ValueError, struct.error) as error:
            raise ValueError(f"its columns are not of this layout ({error})") from error

    def misfits(self, stream: StreamSettings) -> list[str]:
        """What of the record is not as all records of the stream are, except for the content of the images."""
        found = []
        if self.task != stream.task:
            found.append(f"it is of the task {self.task} in a stream of {stream.task}")
        if len(self.images) != stream.inputs:
            found.append(f"it has {len(self.images)} input images in a stream of {stream.inputs}")
        if not self.images and not self.target:
            found.append("it has no image")
        # Latents are of the target, then of each input; where the first input is the target, they are stored once.
        each = stream.latents.bytes if stream.latents else 0
        expected = [each if file else 0 for file in (self.target, *self.images)] if stream.latents else []
        lengths = [len(latents) for latents in self.latents]
        return found if lengths == expected else [*found, f"its latents have {lengths} bytes, not {expected}"]
