"""The ledger of a data set: which partitions are finished, and what each holds and left out."""

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_pipeline.plan import Settings
from data_pipeline.records import Rejection
from wemmu.config.serving import fault_of
from wemmu.config.shards import LEDGER, SCAN, SETTINGS_FILE, Schema, ShardError, Stream, StreamSettings
from wemmu.config.task import Task

# A partition, or one that is being written aside (`data_pipeline.partitions`).
_PARTITION = re.compile(r"(?P<number>\d{5,})(?P<aside>\.[0-9a-f]{32}\.tmp)?")


class Shards(Schema):
    """What one partition has in one stream: `shards` are the entries of its MDS index, with sizes and sha256."""

    settings: StreamSettings
    shards: tuple[dict[str, Any], ...]


class Entry(Schema):
    """One finished partition, `ledger/NNNNN.json`. It appears when everything that it speaks of is on disk.

    `read` counts the records that the part gave; `tasks` those that were kept, by task; `unused` those of tasks that
    no stage uses.
    `sides` and `captions` are histograms of kept records: of the shorter side in px of the image that decides the
    bucket (Drawings have none), and of the prompt's length in characters; keys are the lower edges of `SIDE_EDGES` and
    `CAPTION_EDGES`.
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
    """The lower edge of the histogram's bin that `value` falls into."""
    return max(edge for edge in edges if edge <= value)


class Ledger:
    def __init__(self, root: Path):
        self.root, self.directory = root, root / LEDGER

    def entry_file(self, number: int) -> Path:
        return self.directory / f"{partition_name(number)}.json"

    def entries(self, parts: int) -> Iterator[Entry]:
        """The entries that can be read, in order, whatever has become of their shards."""
        for number in range(parts):
            try:
                yield Entry.load(self.entry_file(number))
            except (FileNotFoundError, ShardError):
                continue

    def finished(self, parts: int) -> Iterator[Entry]:
        """The entries of finished partitions, whose shards are all there, in order.

        An entry without its shards, or that cannot be read, is of a partition that is not finished.
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
        """Remove what killed runs left: partitions that the ledger does not hold, and everything begun aside.

        Only names that writing gives; what a user puts beside them stays.
        """
        for folder in (self.root, self.root / LEDGER, self.root / SCAN):
            for left in folder.glob("*.json*.tmp" if folder == self.root else "*.tmp"):
                left.unlink()
        # task / resolution / size / partition
        for directory in (d for task in Task for d in self.root.glob(f"{task}/*/*/*/")):
            number = _PARTITION.fullmatch(directory.name)
            if number and (number["aside"] or int(number["number"]) not in finished):
                shutil.rmtree(directory)


def partition_name(number: int) -> str:
    return f"{number:05d}"


def streams_of(entries: Iterable[Entry]) -> list[tuple[Stream, list[dict[str, Any]]]]:
    """The streams of these partitions together, by name: each without an index, and what the MDS index of it lists."""
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
    """Write down what the data set is made of, or check that it is what was written down before.

    Raises:
        ShardError: if the directory was begun with other settings, or the sources have changed since.
    """
    refuse_other_settings(root, settings)
    path = root / SETTINGS_FILE
    before = Settings.load(path) if path.exists() else None
    if before is None or before.listing != settings.listing:
        if before is not None and any((root / LEDGER).glob("*.json")):
            raise ShardError(
                f"the sources of {root} are not what they were when writing began: {before.parts} parts then, "
                f"{settings.parts} now, or parts of other sizes{_changed(before, settings)}. Bring them back, or write "
                "into another directory"
            )
        # Nothing is finished yet, so nothing of the old sources is in the way.
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
    """Raise ShardError if the data set in `root` was begun with other settings than these, the files of sources apart.

    finished: versions of sources may differ, too: what is complete is not mixed with records of another version.
    """
    path = root / SETTINGS_FILE
    if not path.exists():
        if root.is_dir() and any(p.name not in (".lock", SETTINGS_FILE + ".tmp") for p in root.iterdir()):
            raise ShardError(
                f"{root} is not empty and not a data set of this version; give data.shards a directory of its own"
            )
        return
    before = Settings.load(path)
    if finished:
        settings = settings.model_copy(update={"sources": before.sources})
    if differences := settings.differences(before):
        raise ShardError(
            f"the data set {root} was written with other settings: now {'; '.join(differences)}. Point data.shards to "
            f"another directory, or delete {root} to have it written anew"
        )
