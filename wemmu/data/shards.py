"""One stream of a prepared data set: opened with a cheap look, then every record verified when it is read."""

import json
import os
import struct
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from streaming.base.format import Reader, reader_from_json
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from wemmu.config.shards import COLUMNS, INDEX_FILE, LatentSettings, ShardError, Stream, checksum, unpack
from wemmu.config.task import Task
from wemmu.data.files import DamageError, Files, LostShardError

T = TypeVar("T")

# What damage can raise, by its place and kind. An OSError is this machine's trouble, not the shard's.
_BROKEN = (LookupError, ValueError, OverflowError, MemoryError, struct.error)
# The columns as MDSWriter orders them.
_NAMES = sorted(COLUMNS)
_LENGTHS = struct.Struct(f"<{len(_NAMES)}I")


@dataclass(frozen=True)
class DecodedRecord:
    """One record, decoded.

    `id`: stable and unique. `images`: uint8 [N, 3, H, W], the input images; `target`: uint8 [3, H, W]; in memory the
    channels are last (see `stacked`). `latents`: those of the target, then of each input, [1 + N, C, h, w] in the type
    they are stored in; None without. `answer`: what should be said, of understanding.
    """

    id: str
    prompt: str
    images: Tensor
    target: Tensor
    latents: Tensor | None
    answer: str = ""

    def as_task(self, task: Task) -> "DecodedRecord":
        """A text-to-image record as one of another task: its image is what is to be made, and nothing is said."""
        match task:
            case Task.RECONSTRUCTION:
                latents = None if self.latents is None else self.latents[[0, 0]]
                return replace(self, prompt="", images=self.target[None], latents=latents)
            case Task.UNCONDITIONAL:
                return replace(self, prompt="")
        raise AssertionError(f"no {task} can be made of a text-to-image record")


class ShardStream:
    """Random access to the samples of one stream.

    Shards are opened with streaming, but its data sets are not used: `StreamingDataset` neither checks local files nor
    raises when one is missing (its epoch just ends early), and `LocalDataset` keeps a number per sample. Nor is its
    reader of records, which takes twice as long as `_columns`.

    Args:
        files: where the data set is.
        stream: which one of it.
        damaged: what becomes of a record that is not what was written. "stop" raises. "skip" gives the next whole
            record of the stream in its place, warns once for each shard and counts in `skipped`.
        task: read text-to-image records as those of this task, see `DecodedRecord.as_task`.
        leave_out: ids of records that are not given, but the next one of the stream in their place.

    Raises:
        ShardError: if the index is not the recorded one, or a shard file is missing or of another size.
    """

    def __init__(
        self,
        files: Files,
        stream: Stream,
        damaged: Literal["stop", "skip"] = "stop",
        task: Task | None = None,
        leave_out: frozenset[str] = frozenset(),
    ):
        self._files, self._stream, self._damaged, self._task = files, stream, damaged, task
        self._leave_out = leave_out
        self.settings = stream.settings
        if task is not None:
            inputs = 1 if task is Task.RECONSTRUCTION else 0
            self.settings = stream.settings.model_copy(update={"task": task, "inputs": inputs})
        # (shard file, record in it) -> how often another record was given in its place.
        self.skipped: Counter[tuple[str, int]] = Counter()
        self._counting = threading.Lock()
        self._warned: set[str] = set()
        # Shard files that are known to be lost, and what is wrong with them.
        self._lost: dict[str, str] = {}
        self._shards = self._open()
        self.sizes = np.array([shard.samples for _, shard in self._shards])
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def shard_bytes(self) -> np.ndarray:
        """The size of each shard file, beside `sizes`, its number of records."""
        return np.array([shard.raw_data.bytes for _, shard in self._shards])

    def __getitem__(self, index: int) -> DecodedRecord:
        """Raises ShardError; with `damaged` = "skip" only if no record of the stream can be read."""
        sample = self._get(int(index), self._decoded)
        return sample if self._task is None else sample.as_task(self._task)

    def id_of(self, index: int) -> str:
        """The id of the sample that `self[index]` is, without decoding it."""
        return self._get(int(index), lambda columns: str(columns["id"]))

    def where(self, index: int) -> str:
        """The shard file of the sample at `index`, and its place there, for messages."""
        shard, record = self._place(index)
        return f"record {record} of {self._files.path(self._stream, self._shards[shard][0])}"

    def _get(self, index: int, decode: Callable[[dict[str, Any]], T]) -> T:
        damaged = False
        for tried in range(len(self)):
            shard, record = self._place((index + tried) % len(self))
            try:
                found, id = self._read(shard, record, decode)
            except DamageError as error:
                if self._damaged == "stop":
                    raise
                self._warn(self._shards[shard][0], error)
                damaged = True
                continue
            if id in self._leave_out:
                continue
            if damaged:
                self._count(index)
            return found
        held_out = " or held out" if self._leave_out else ""
        raise ShardError(f"every record of the stream {self._stream.settings.name} is missing or damaged{held_out}")

    def _open(self) -> list[tuple[str, Reader]]:
        """Name and reader of every shard file."""
        shards = []
        for info in json.loads(self._files.index(self._stream))["shards"]:
            name = info["raw_data"]["basename"]
            path = self._files.path(self._stream, name)
            shard = reader_from_json(str(path.parent), None, info)
            shard.raw_data.basename = path.name
            # Other types could execute what they hold.
            columns = list(zip(info["column_names"], info["column_encodings"], strict=True))
            if columns != sorted(COLUMNS.items()) or info["compression"]:
                raise ShardError(f"{path} has other columns than this version of the layout, {', '.join(COLUMNS)}")
            shards.append((name, shard))
            try:
                self._files.check(self._stream, name, shard.raw_data.bytes)
            except LostShardError as error:
                if self._damaged == "stop":
                    raise
                self._lost[name] = str(error)
                self._warn(name, error)
        names = {INDEX_FILE, *(name for name, _ in shards)}
        samples = sum(shard.samples for _, shard in shards)
        if names != self._stream.files.keys() or samples != self._stream.samples:
            raise ShardError(
                f"the stream {self._stream.settings.name} is recorded with {self._stream.samples} samples in "
                f"{len(self._stream.files) - 1} shard files, its index has {samples} in {len(shards)}"
            )
        return shards

    def _place(self, index: int) -> tuple[int, int]:
        """Shard, and record in it, of a sample."""
        shard = int(np.searchsorted(self._ends, index, "right"))
        return shard, index - int(self._ends[shard] - self.sizes[shard])

    def _read(self, shard: int, record: int, decode: Callable[[dict[str, Any]], T]) -> tuple[T, str]:
        """A record, decoded, and its id.

        Raises DamageError naming file, record and reason unless all of the record is what was written.
        """
        name, reader = self._shards[shard]
        if name in self._lost:
            raise LostShardError(self._lost[name])
        columns: dict[str, Any] = {}
        try:
            with self._files.held(self._stream, name, reader.raw_data.bytes):
                columns = _columns(self._files.path(self._stream, name), record, reader.raw_data.bytes)
            return decode(columns), columns["id"]
        except ShardError as error:
            if isinstance(error, LostShardError):
                self._lost[name] = str(error)
            raise
        except (*_BROKEN, _BadRecordError) as error:
            path, way_out = self._files.path(self._stream, name), self._files.way_out(self._stream, name)
            reason = str(error) if isinstance(error, _BadRecordError) else f"{type(error).__name__}: {error}"
            id = f", {columns['id']}" if columns else ""
            raise DamageError(
                f"the shard file {path} is damaged in record {record}{id} ({reason}); {way_out}"
            ) from error

    def _decoded(self, columns: dict[str, Any]) -> DecodedRecord:
        stored = self._stream.settings
        inputs = [self._decode(image) for image in unpack(columns["images"])]
        if len(inputs) != stored.inputs:
            raise _BadRecordError(f"it has {len(inputs)} input images in a stream of {stored.inputs}")
        images = stacked(inputs) if inputs else torch.empty(0, 3, stored.height, stored.width, dtype=torch.uint8)
        if not columns["target"] and not inputs:
            raise _BadRecordError("it has no image")
        target = self._decode(columns["target"]) if columns["target"] else images[0]
        latents = None if stored.latents is None else _latents(columns["latents"], stored.latents, stored.inputs)
        return DecodedRecord(columns["id"], columns["prompt"], images, target, latents, columns["answer"])

    def _decode(self, image: memoryview) -> Tensor:
        try:
            pixels = decode_image(torch.frombuffer(image, dtype=torch.uint8), ImageReadMode.RGB)  # [3, H, W]
        except RuntimeError as error:
            raise _BadRecordError(f"it has an image that cannot be decoded: {error}") from error
        size = self.settings.height, self.settings.width
        if pixels.dtype != torch.uint8 or pixels.shape != (3, *size):
            raise _BadRecordError(f"it has an image of {tuple(pixels.shape[1:])} px in a stream of {size} px")
        return pixels

    def _count(self, index: int) -> None:
        shard, record = self._place(index)
        with self._counting:
            self.skipped[self._name(self._shards[shard][0]), record] += 1

    def _warn(self, name: str, error: DamageError) -> None:
        with self._counting:
            if name in self._warned:
                return
            self._warned.add(name)
        warnings.warn(f"data.damaged is skip, so the run goes on without: {error}", stacklevel=2)

    def _name(self, name: str) -> str:
        return f"{self._stream.settings.name}/{name}"


class _BadRecordError(Exception):
    """What is wrong with a record, without where it is."""


def stacked(images: Sequence[Tensor]) -> Tensor:
    """As torch.stack of [..., 3, H, W], but the channels stay last in memory, where the decoder of JPEG puts them.

    That copies whole rows; to move the channels takes ten times as long, a sixth of the time that decoding takes.
    """
    return torch.stack([image.movedim(-3, -1) for image in images]).movedim(-1, -3)


def _columns(path: Path, record: int, size: int) -> dict[str, Any]:
    """A record of the shard file, which has `size` bytes.

    An MDS shard is: the number of records (uint32), where each begins and the last ends (uint32), JSON, the records.
    A record is the lengths (uint32) of its columns, then the columns. Bytes come as views of one buffer.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        begin, end = struct.unpack("<2I", os.pread(file, 8, 4 * (1 + record)))
        if not begin < end <= size:
            raise _BadRecordError(f"it would begin at {begin} and end at {end} of {size} bytes")
        # One that can be written to, without which torch warns of reading images from it.
        data = bytearray(end - begin)
        os.preadv(file, [data], begin)
    finally:
        os.close(file)
    columns, at = {}, _LENGTHS.size
    for name, length in zip(_NAMES, _LENGTHS.unpack_from(data), strict=True):
        columns[name] = memoryview(data)[at : at + length]
        at += length
    if checksum(columns) != columns["checksum"]:
        raise _BadRecordError("its checksum differs")
    # A damaged offset of another record can lead to the whole of this one.
    if at != len(data):
        raise _BadRecordError("its offset is another record's")
    return {name: str(value, "utf-8") if COLUMNS[name] == "str" else value for name, value in columns.items()}


def _latents(data: memoryview, settings: LatentSettings, inputs: int) -> Tensor:
    """[1 + inputs, C, h, w]; where the first input is the target, it is stored once."""
    parts = unpack(data)
    if parts and not parts[0]:
        parts[0] = parts[1]
    shape, dtype = (settings.channels, settings.rows, settings.columns), getattr(torch, settings.dtype)
    lengths = {len(part) for part in parts}
    if len(parts) != 1 + inputs or lengths != {int(np.prod(shape)) * dtype.itemsize}:
        raise _BadRecordError(f"it has {len(parts)} latents of {lengths} bytes, not {1 + inputs} of {shape} {dtype}")
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=dtype).unflatten(0, (-1, *shape))
