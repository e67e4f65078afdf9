"""Reads one stream of a prepared data set; checks file sizes when it opens and every record when it reads."""

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from wemmu.config.shards import COLUMNS, INDEX_FILE, Bytes, LatentSettings, ShardError, StoredRecord, Stream
from wemmu.config.task import Task
from wemmu.data.files import DamageError, Files, LostShardError
from wemmu.mds import BrokenShardError, Shard, shards_of
from wemmu.pixels import stored_pixels

T = TypeVar("T")


@dataclass(frozen=True)
class DecodedRecord:
    """One record, decoded.

    `id`: stable and unique. `images`: uint8 [N, 3, H, W], the input images, or one by one of a mixed stream. `target`:
    uint8 [3, H, W]; in memory the channels are last (see `stacked`). `latents`: of the target, then of each input that
    has any, [1 + N, C, h, w] in their stored type; None if none are stored. `answer`: the label of an understanding
    record, the caption of a caption record.
    """

    id: str
    prompt: str
    images: Tensor | tuple[Tensor, ...]
    target: Tensor
    latents: Tensor | None
    answer: str = ""

    @property
    def stored(self) -> Tensor:
        """The latents of a record of a stream that stores them."""
        assert self.latents is not None
        return self.latents

    def as_task(self, task: Task) -> "DecodedRecord":
        """Return a text-to-image record as a record of `task`: its image is the target, and the prompt is empty.

        Of a caption record the image is the input, and the prompt is the answer.
        """
        match task:
            case Task.RECONSTRUCTION:
                latents = None if self.latents is None else self.latents[[0, 0]]
                return replace(self, prompt="", images=self.target[None], latents=latents)
            case Task.CAPTION:
                return replace(self, prompt="", images=self.target[None], answer=self.prompt)
            case Task.UNCONDITIONAL:
                return replace(self, prompt="")
        raise AssertionError(f"a text-to-image record cannot serve {task}")


class ShardStream:
    """Random access to the samples of one stream.

    Not streaming's data sets: `StreamingDataset` neither checks local files nor raises when one is missing (its epoch
    just ends early), and `LocalDataset` keeps a number per sample.

    Args:
        files: where the data set is.
        stream: which one of it.
        damaged: how to treat a damaged record. "stop" raises. "skip" returns the next whole record of the stream
            instead, warns once for each shard and counts in `skipped`.
        task: read text-to-image records as records of this task, see `DecodedRecord.as_task`.
        leave_out: ids of records to skip; the next record of the stream is returned instead.

    Raises:
        ShardError: if the index differs from the recorded one, or a shard file is missing or has another size.
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
            inputs = 0 if task is Task.UNCONDITIONAL else 1
            self.settings = stream.settings.model_copy(update={"task": task, "inputs": inputs})
        # (shard file, record in it) -> how often another record replaced it.
        self.skipped: Counter[tuple[str, int]] = Counter()
        self._counting = threading.Lock()
        self._warned: set[str] = set()
        # Shard file that cannot be read -> what is wrong with it.
        self._lost: dict[str, str] = {}
        self._shards = self._open()
        self.sizes = np.array([shard.samples for shard in self._shards.values()])
        # The size of each shard file, beside `sizes`, its number of records.
        self.shard_bytes = np.array([shard.bytes for shard in self._shards.values()])
        self._names, self._ends = list(self._shards), np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> DecodedRecord:
        """Raise ShardError; with `damaged` = "skip" only if no record of the stream can be read."""
        record, replaced = self._get(index, self._decoded)
        if replaced:
            self._count(index)
        return record if self._task is None else record.as_task(self._task)

    def id_of(self, index: int) -> str:
        """Return the id of `self[index]` without decoding its images."""
        return self._get(index, lambda record: record.id)[0]

    def text_bytes(self, index: int) -> int:
        """Return the length in UTF-8 of prompt and answer of `self[index]` without decoding its images."""
        if self._task in (Task.RECONSTRUCTION, Task.UNCONDITIONAL):
            return 0
        return self._get(index, lambda record: len(f"{record.prompt}{record.answer}".encode()))[0]

    def where(self, index: int) -> str:
        """Name the shard file of record `index` and its place in it, for messages."""
        name, number = self._place(index)
        return f"record {number} of {self._files.path(self._stream, name)}"

    def _get(self, index: int, decode: Callable[[StoredRecord], T]) -> tuple[T, bool]:
        """Return what `decode` makes of the record, and whether another stands for a damaged one."""
        damaged = False
        for tried in range(len(self)):
            name, number = self._place((index + tried) % len(self))
            try:
                found, id = self._read(name, number, decode)
            except DamageError as error:
                if self._damaged == "stop":
                    raise
                self._warn(name, error)
                damaged = True
                continue
            if id in self._leave_out:
                continue
            return found, damaged
        held_out = " or held out" if self._leave_out else ""
        raise ShardError(f"every record of the stream {self._stream.settings.name} is missing or damaged{held_out}")

    def _open(self) -> dict[str, Shard]:
        """Every shard of the stream by its file's name, at its path on this machine."""
        directory, shards = Path(self._stream.settings.name), {}
        for shard in shards_of(self._files.index(self._stream), directory):
            name = str(shard.path.relative_to(directory))
            path = self._files.path(self._stream, name)
            # Columns of other types could run code when they are decoded.
            if not shard.is_ours:
                raise ShardError(f"{path} has other columns than this version of the layout, {', '.join(COLUMNS)}")
            shards[name] = replace(shard, path=path)
            try:
                self._files.check(self._stream, name, shard.bytes)
            except LostShardError as error:
                if self._damaged == "stop":
                    raise
                self._lost[name] = str(error)
                self._warn(name, error)
        samples = sum(shard.samples for shard in shards.values())
        if {INDEX_FILE, *shards} != self._stream.files.keys() or samples != self._stream.samples:
            raise ShardError(
                f"the stream {self._stream.settings.name} is recorded with {self._stream.samples} samples in "
                f"{len(self._stream.files) - 1} shard files, its index has {samples} in {len(shards)}"
            )
        return shards

    def _place(self, index: int) -> tuple[str, int]:
        """Shard file, and number in it, of a record."""
        shard = int(np.searchsorted(self._ends, index, "right"))
        return self._names[shard], index - int(self._ends[shard] - self.sizes[shard])

    def _read(self, name: str, number: int, decode: Callable[[StoredRecord], T]) -> tuple[T, str]:
        """Read and decode a record; return it with its id.

        Raises:
            DamageError: if any of the record is damaged, naming file, record and reason.
        """
        if name in self._lost:
            raise LostShardError(self._lost[name])
        shard, id = self._shards[name], ""
        try:
            with self._files.available(self._stream, name, shard.bytes):
                record = StoredRecord.of(shard.record(number))
            id = f", {record.id}"
            if misfits := record.misfits(self._stream.settings):
                raise ValueError(misfits[0])
            return decode(record), record.id
        except LostShardError as error:
            self._lost[name] = str(error)
            raise
        except ValueError as error:
            if isinstance(error, ShardError) and not isinstance(error, BrokenShardError):
                raise
            reason = error.reason if isinstance(error, BrokenShardError) else error
            raise DamageError(
                f"the shard file {shard.path} is damaged in record {number}{id} ({reason}); "
                f"{self._files.remedy(self._stream, name)}"
            ) from error

    def _decoded(self, record: StoredRecord) -> DecodedRecord:
        stored = self._stream.settings
        latents = None if stored.latents is None else _latents(record.latents, stored.latents)
        if stored.mixed:
            inputs = tuple(stored_pixels(image) for image in record.images)
            return DecodedRecord(record.id, record.prompt, inputs, self._pixels(record.target), latents, record.answer)
        same = [self._pixels(image) for image in record.images]
        images = stacked(same) if same else torch.empty(0, 3, stored.height, stored.width, dtype=torch.uint8)
        target = self._pixels(record.target) if record.target else images[:1].squeeze(0)
        return DecodedRecord(record.id, record.prompt, images, target, latents, record.answer)

    def _pixels(self, file: Bytes) -> Tensor:
        pixels, size = stored_pixels(file), (self.settings.height, self.settings.width)
        if pixels.shape[1:] != size:
            raise ValueError(f"it has an image of {tuple(pixels.shape[1:])} px in a stream of {size} px")
        return pixels

    def _count(self, index: int) -> None:
        name, number = self._place(index)
        with self._counting:
            self.skipped[f"{self._stream.settings.name}/{name}", number] += 1

    def _warn(self, name: str, error: DamageError) -> None:
        with self._counting:
            if name in self._warned:
                return
            self._warned.add(name)
        warnings.warn(f"data.damaged is skip, so the run goes on without: {error}", stacklevel=2)


def stacked(images: Sequence[Tensor]) -> Tensor:
    """Stack [..., 3, H, W] as torch.stack, but keep the channels last in memory, where the JPEG decoder puts them.

    So whole rows are copied. Moving the channels takes ten times as long, a sixth of the time of decoding.
    """
    return torch.stack([image.movedim(-3, -1) for image in images]).movedim(-1, -3)


def _latents(parts: list[Bytes], settings: LatentSettings) -> Tensor:
    """[1 + inputs, C, h, w]; where the first input is the target, it is stored once."""
    parts = [parts[0] or parts[1], *parts[1:]]
    shape = settings.channels, settings.rows, settings.columns
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=getattr(torch, settings.dtype)).unflatten(0, (-1, *shape))
