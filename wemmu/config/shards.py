"""The layout of a prepared data set: what `data_pipeline` writes and `wemmu.data` reads (docs/data.md).

settings.json                   the settings, written first
ledger/00000.json ...           one finished partition each: its part of each stream, and what it rejected
scan/00000.npy ...              hashes of the records of each partition, if duplicates are dropped
rejected.jsonl                  every rejected record, with source, key and reason
<task>/<resolution>/<H>x<W>/    one stream, a local MDS data set; <H>x<W>-mixed/ if input images have other sizes
    index.json                  the MDS index of all its partitions
    00000/ 00001/ ...           the shards of its partitions
dataset.json                    written last: if it exists, the data set is complete
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import xxhash
from pydantic import Field, ValidationError

from wemmu.config.base import Config, Positive
from wemmu.config.files import barely_begun, nearest, replace_text
from wemmu.config.neighbours import instead
from wemmu.config.task import Task

VERSION = 2
DATASET_FILE = "dataset.json"
SETTINGS_FILE = "settings.json"
INDEX_FILE = "index.json"
REJECTED_FILE = "rejected.jsonl"
LEDGER = "ledger"
SCAN = "scan"
# Of a column; a shard gives views.
Bytes = bytes | memoryview
# Between the turns of a conversation in `prompt` and in `answer`: a control character, which no text of a source keeps.
TURN = "\x17"
REWRITE = "run `wemmu data write CURRICULUM` again"
# MDS types that decode without executing code.
#   prompt    the VLM's text; empty for tasks without text
#   answer    the VLM's answer, of understanding; the caption, of caption records that have one
#   images    the input images as files (JPEG or PNG), see `pack`
#   target    the target image as a file; empty if the first input is the target, or for understanding and captions
#   latents   empty, or see `pack`: the latents of the target, then of each input, each [channels, rows, columns]
#   checksum  of all other columns, see `checksum`; readers compare it, so damage never becomes wrong pixels
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
    """An unusable data set; the message names the file or field and the remedy."""


class Schema(Config):
    """A JSON file of the data set."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raise FileNotFoundError if the file is missing, ShardError if this version cannot read it."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValidationError as error:
            anew = f"; if it is damaged, delete {path} and {REWRITE}" if path.name == DATASET_FILE else ""
            raise ShardError(
                f"{path} is not of this version of the shard layout; write the data set again into an empty directory "
                f"({error.errors()[0]['loc']}: {error.errors()[0]['msg']}){anew}"
            ) from error

    def save(self, path: Path) -> None:
        """Write as JSON, atomically."""
        replace_text(path, self.model_dump_json(indent=1))


class LatentSettings(Schema):
    """Everything that defines a stored latent; training refuses latents of another autoencoder.

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
        """The size of one image's latents, in bytes."""
        return self.channels * self.rows * self.columns * {"float32": 4, "bfloat16": 2}[self.dtype]


class StreamSettings(Schema):
    """The common properties of a stream's records, so that any of them can share a batch.

    `height` and `width` are the size of every image in px, `inputs` is the number of input images of a record. mixed:
    the input images have sizes of their own, of about as many pixels, and no latents.
    """

    task: Task
    resolution: Positive
    height: Positive
    width: Positive
    inputs: Annotated[int, Field(ge=0)]
    mixed: bool = False
    latents: LatentSettings | None = None

    @property
    def name(self) -> str:
        """The stream's directory, relative to the data set's."""
        usual = {Task.MULTI_EDIT: None, Task.UNDERSTANDING: 1}.get(self.task, self.inputs)
        several = f"x{self.inputs}" if self.inputs != usual else ""
        return f"{self.task}/{self.resolution}/{self.height}x{self.width}{several}{'-mixed' * self.mixed}"


class Stream(Schema):
    """A finished stream. `files` maps each file, its index included, to its sha256; `bytes` counts the shards."""

    settings: StreamSettings
    samples: Positive
    bytes: int
    files: dict[str, str]


def refuse_foreign(root: Path) -> None:
    """Raise ShardError if no data set can be written into `root`: it is below a file, or holds something else."""
    place = nearest(root)
    if not place.is_dir():
        raise ShardError(f"{root} cannot hold a data set: {place} is a file; set data.shards to another folder")
    if place == root and not (root / SETTINGS_FILE).exists() and not barely_begun(root, SETTINGS_FILE, (".lock",)):
        raise ShardError(
            f"{root} is not empty and not a data set of this version; set data.shards to another directory"
        )


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
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ShardError(
                f"{root} holds no complete data set (it has no {DATASET_FILE}); `wemmu data write "
                f"CURRICULUM` writes or completes it{instead(root, 'shards')}"
            ) from error


def written_anew(root: Path | str, stream: str, name: str) -> str:
    """Return how to write the partition of shard file `name` again, in the data set at `root` or a URL."""
    partition = name.split("/")[0]
    parts = f"{stream}/{partition}", f"{LEDGER}/{partition}.json", DATASET_FILE
    return f"to write it again, delete {', '.join(f'{root}/{part}' for part in parts)} and {REWRITE}"


def checksum(columns: Mapping[str, Any]) -> bytes:
    """Return 8 bytes that change with any other column."""
    digest = xxhash.xxh3_64()
    for name in COLUMNS:
        if name != "checksum":
            value = columns[name]
            data = value.encode() if isinstance(value, str) else value
            digest.update(struct.pack("<Q", len(data)))
            digest.update(data)
    return digest.digest()


def pack(parts: Sequence[bytes]) -> bytes:
    """Join byte strings: their number, their lengths (uint32, little-endian), then their content."""
    return struct.pack(f"<{1 + len(parts)}I", len(parts), *map(len, parts)) + b"".join(parts)


def unpack(data: Bytes) -> list[Bytes]:
    """Return the byte strings that `pack` joined."""
    (number,) = struct.unpack_from("<I", data)
    parts: list[Bytes] = []
    offset = 4 * (1 + number)
    for length in struct.unpack_from(f"<{number}I", data, 4):
        parts.append(data[offset : offset + length])
        offset += length
    return parts


@dataclass(frozen=True)
class StoredRecord:
    """A stored record with unpacked lists: images are files, latents are bytes of one image each.

    Binary fields have the type of the columns, which may be views of the shard.
    """

    id: str
    task: Task
    prompt: str
    answer: str
    images: list[Bytes]
    target: Bytes
    latents: list[Bytes]

    @classmethod
    def of(cls, columns: Mapping[str, Bytes]) -> Self:
        """Return the record of these columns.

        Raises:
            ValueError: if they are damaged, or of another layout.
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
        """Yield how the record differs from its stream, not counting the content of images."""
        found = []
        if self.task != stream.task:
            found.append(f"it has the task {self.task} in a stream of {stream.task}")
        if len(self.images) != stream.inputs:
            found.append(f"it has {len(self.images)} input images in a stream of {stream.inputs}")
        if not self.images and not self.target and self.task is not Task.UNDERSTANDING:
            found.append("it has no image")
        # Latents of the target, then of each input; stored once if the first input is the target.
        each = stream.latents.bytes if stream.latents else 0
        inputs = [b""] * len(self.images) if stream.mixed else self.images
        expected = [each if file else 0 for file in (self.target, *inputs)] if stream.latents else []
        lengths = [len(latents) for latents in self.latents]
        return found if lengths == expected else [*found, f"its latents have {lengths} bytes, not {expected}"]
