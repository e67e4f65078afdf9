"""One stream of a prepared data set, verified once and then read by index."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from streaming.base.local import LocalDataset
from torch import Tensor
from torchvision.io import ImageReadMode, decode_png

from wemmu.config.shards import DATASET_FILE, DataSet, ShardError, Stream, unpack
from wemmu.config.task import Task


@dataclass(frozen=True)
class Sample:
    """`images`: uint8 [N, 3, H, W], the input pictures; `target`: uint8 [3, H, W]; `id`: stable and unique."""

    id: str
    prompt: str
    images: Tensor
    target: Tensor


class ShardStream:
    """Random access to the samples of one stream.

    `LocalDataset` and not `StreamingDataset`, because the latter neither checks local files nor raises when one is
    missing: its epoch just ends early.

    Raises:
        ShardError: if a file of the stream is missing or its content is not the one recorded when it was written.
    """

    def __init__(self, root: Path, stream: Stream):
        _verify(root, stream)
        self.settings = stream.settings
        self._samples = LocalDataset(str(root / stream.settings.name))

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        columns = self._samples[int(index)]
        size = self.settings.height, self.settings.width
        images = torch.empty(0, 3, *size, dtype=torch.uint8)
        if pictures := [_decode(png, size, columns["id"]) for png in unpack(columns["images"])]:
            images = torch.stack(pictures)
        target = _decode(columns["target"], size, columns["id"]) if columns["target"] else images[0]
        return Sample(columns["id"], columns["prompt"], images, target)


def open_streams(root: Path, tasks: Iterable[Task], resolution: int) -> list[ShardStream]:
    """The streams of `tasks` at `resolution`, in the order of the tasks and then of the names.

    Raises:
        ShardError: if the data set is incomplete or damaged, or has no stream for one of the tasks.
    """
    streams = sorted(DataSet.at(root).streams, key=lambda s: s.settings.name)
    opened = []
    for task in tasks:
        found = [s for s in streams if (s.settings.task, s.settings.resolution) == (task, resolution)]
        if not found:
            raise ShardError(
                f"the data set {root} has no stream of {task} at {resolution} px; it has: "
                f"{', '.join(s.settings.name for s in streams)}"
            )
        opened += [ShardStream(root, stream) for stream in found]
    return opened


def _verify(root: Path, stream: Stream) -> None:
    for name, digest in stream.files.items():
        path = root / stream.settings.name / name
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            found = None
        if found != digest:
            state = "missing" if found is None else "damaged (its sha256 differs)"
            raise ShardError(
                f"the shard file {path} is {state}; to have it written anew, delete "
                f"{path.parent if '/' in name else path} and {root / DATASET_FILE} and run `python -m data_pipeline "
                "write CURRICULUM.yaml` again"
            )


def _decode(png: bytes, size: tuple[int, int], record: str) -> Tensor:
    # torch warns of memory it may not write to, hence the copy into a bytearray.
    picture = decode_png(torch.frombuffer(bytearray(png), dtype=torch.uint8), ImageReadMode.RGB)  # [3, H, W]
    if picture.shape[1:] != size:
        raise ShardError(f"record {record} has a picture of {tuple(picture.shape[1:])} px in a stream of {size} px")
    return picture
