"""The ledger of a data set: the finished partitions, what each holds and what it rejected."""

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, field_validator
from typing_extensions import TypedDict

from data_pipeline.plan import Settings
from data_pipeline.records import Rejection
from wemmu.config.serving import fault_of
from wemmu.config.shards import LEDGER, SCAN, SETTINGS_FILE, Schema, ShardError, Stream, StreamSettings, refuse_foreign
from wemmu.config.task import Task

# Name of a partition, finished or in progress (`data_pipeline.partitions`).
_PARTITION = re.compile(r"(?P<number>\d{5,})(?P<aside>\.[0-9a-f]{32}\.tmp)?")


class _Hashes(TypedDict):
    sha256: str


class _RawData(TypedDict):
    basename: str
    bytes: int
    hashes: _Hashes


class _IndexEntry(TypedDict):
    raw_data: _RawData
    samples: int


class Shards(Schema):
    """One partition's part of a stream; `shards` are the entries of its MDS index, with sizes and sha256."""

    settings: StreamSettings
    shards: tuple[dict[str, Any], ...]

    @field_validator("shards")
    @classmethod
    def _check(cls, shards: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
        """Refuse entries without what is read of them; they stay as the writer made them."""
        TypeAdapter(tuple[_IndexEntry, ...]).validate_python(shards)
        return shards


class Entry(Schema):
    """One finished partition, `ledger/NNNNN.json`. It is written after everything that it names is on disk.

    `read` counts all records of the part, `tasks` the kept ones by task, `unused` those of unused tasks. `sides` and
    `captions` are histograms of kept records: the shorter side, in px, of the image that decides the bucket (Drawings
    have none), and the prompt's length in characters. Keys are the lower edges of `SIDE_EDGES` and `CAPTION_EDGES`.
    """

    number: int
    source: str
    part: str
    read: int
    tasks: dict[Task, int]
    unused: dict[Task, int]
    streams: tuple[Shards, ...]
    rejected: tuple[Rejection, ...]
    sides: dict[int, int]
    captions: dict[int, int]

    @property
    def damaged(self) -> int:
        return sum(r.reason.damaged for r in self.rejected)


SIDE_EDGES = (0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
CAPTION_EDGES = (0, 1, 16, 32, 64, 128, 256, 512, 1024)


def lower_edge(value: int, edges: tuple[int, ...]) -> int:
    """Return the lower edge of the histogram bin of `value`."""
    return max(edge for edge in edges if edge <= value)


class Ledger:
    def __init__(self, root: Path):
        self.root, self.directory = root, root / LEDGER

    def entry_file(self, number: int) -> Path:
        return self.directory / f"{partition_name(number)}.json"

    def entries(self, parts: int) -> Iterator[Entry]:
        """Yield the readable entries in order, whether or not their shards exist."""
        for number in range(parts):
            try:
                yield Entry.load(self.entry_file(number))
            except (FileNotFoundError, ShardError):
                continue

    def finished(self, parts: int) -> Iterator[Entry]:
        """Yield the entries of finished partitions, in order.

        A partition is not finished if its entry is unreadable or a shard is missing.
        """
        return filter(self._whole, self.entries(parts))

    def _whole(self, entry: Entry) -> bool:
        sizes = {
            self.root / stream.settings.name / shard["raw_data"]["basename"]: shard["raw_data"]["bytes"]
            for stream, shards in streams_of([entry])
            for shard in shards
        }
        return not any(fault_of(path, size) for path, size in sizes.items())

    def clear_unfinished(self, finished: set[int]) -> None:
        """Remove the remains of killed runs: partitions that are not in the ledger, and partial ones.

        Only removes names that the writer uses; a user's files stay.
        """
        # task / resolution / size, which holds the index of a stream and its partitions
        streams = [folder for task in Task for folder in self.root.glob(f"{task}/*/*/")]
        for folder in (self.root, self.root / LEDGER, self.root / SCAN, *streams):
            for left in folder.glob("*.tmp" if folder.name in (LEDGER, SCAN) else "*.json*.tmp"):
                left.unlink()
        for directory in (d for stream in streams for d in stream.glob("*/")):
            number = _PARTITION.fullmatch(directory.name)
            if number and (number["aside"] or int(number["number"]) not in finished):
                shutil.rmtree(directory)


def partition_name(number: int) -> str:
    return f"{number:05d}"


def streams_of(entries: Iterable[Entry]) -> list[tuple[Stream, list[dict[str, Any]]]]:
    """Merge the streams of these partitions by name: each without an index, and the entries of its MDS index."""
    held: dict[StreamSettings, list[dict[str, Any]]] = {}
    for entry in entries:
        for shards in entry.streams:
            for shard in shards.shards:
                name = f"{partition_name(entry.number)}/{shard['raw_data']['basename']}"
                indexed = {**shard, "raw_data": {**shard["raw_data"], "basename": name}}
                held.setdefault(shards.settings, []).append(indexed)
    return [
        (
            Stream(
                settings=settings,
                samples=sum(shard["samples"] for shard in shards),
                bytes=sum(shard["raw_data"]["bytes"] for shard in shards),
                files={shard["raw_data"]["basename"]: shard["raw_data"]["hashes"]["sha256"] for shard in shards},
            ),
            shards,
        )
        for settings, shards in sorted(held.items(), key=lambda item: item[0].name)
    ]


def begin(root: Path, settings: Settings) -> None:
    """Record the settings and sources of the data set, or compare them with the recorded ones.

    Raises:
        ShardError: if the settings differ, or the sources have changed.
    """
    refuse_other_settings(root, settings)
    path = root / SETTINGS_FILE
    before = Settings.load(path) if path.exists() else None
    if before is None or before.listing != settings.listing:
        if before is not None and any((root / LEDGER).glob("*.json")):
            raise ShardError(
                f"the sources of {root} have changed since writing began: {before.parts} parts then, "
                f"{settings.parts} now, or parts of other sizes{_changed(before, settings)}. Restore them, or write "
                "into another directory"
            )
        # Nothing is finished yet, so there are no records of the old sources.
        shutil.rmtree(root / SCAN, ignore_errors=True)
        settings.save(path)
    (root / LEDGER).mkdir(exist_ok=True)


def _changed(before: Settings, now: Settings) -> str:
    return "".join(
        f"; {source}: {before.files[source][0]} files then, {files[0]} now"
        for source, files in now.files.items()
        if before.files.get(source, files) != files
    )


def refuse_other_settings(root: Path, settings: Settings, finished: bool = False) -> None:
    """Raise ShardError if the settings of the data set in `root` differ, not counting the sources' files.

    finished: also ignore versions of sources: a complete data set is not mixed with records of another version.
    """
    path = root / SETTINGS_FILE
    refuse_foreign(root)
    if not path.exists():
        return
    before = Settings.load(path)
    if finished:
        settings = settings.model_copy(update={"sources": before.sources})
    if differences := settings.differences(before):
        raise ShardError(
            f"the data set {root} was written with other settings: now {'; '.join(differences)}. Set data.shards to "
            f"another directory, or delete {root} to write it again"
        )
