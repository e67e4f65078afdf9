"""Writes one partition in one worker; it is either finished or not in the ledger."""

import os
import shutil
import uuid
from collections import Counter, deque
from pathlib import Path
from typing import TYPE_CHECKING

from data_pipeline.chain import Services, SizedRecord, chain, columns_of
from data_pipeline.ledger import (
    CAPTION_EDGES,
    SIDE_EDGES,
    Entry,
    Ledger,
    Shards,
    lower_edge,
    partition_name,
)
from data_pipeline.plan import Job
from data_pipeline.records import Reason, RejectedError, Rejection, SourcePartition, WorkerError
from wemmu.config.files import naming, sync
from wemmu.config.shards import COLUMNS, StreamSettings
from wemmu.config.task import Task

if TYPE_CHECKING:
    from streaming import MDSWriter

# Each stream's shard stays in memory until it is full, so a worker needs this times the number of streams.
SHARD_BYTES = 2**25


def write_partition(
    job: Job,
    number: int,
    part: SourcePartition,
    dropped: frozenset[int] = frozenset(),
    services: Services | None = None,
) -> Entry:
    """Write partition `number` with the records of `part`; return its ledger entry.

    Shards are written beside their place, synced and renamed, then the ledger entry likewise. A kill in between leaves
    a partition without an entry, which the next run writes again.
    """
    out = _Writers(job.root, number)
    rejected: list[Rejection] = []
    # Count a record once, also at several resolutions.
    written: set[str] = set()
    tasks: Counter[Task] = Counter()
    unused: Counter[Task] = Counter()
    sides: Counter[int] = Counter()
    captions: Counter[int] = Counter()

    def reject(key: str, error: RejectedError) -> None:
        if error.reason is Reason.UNUSED:
            unused[Task(error.detail)] += 1
            return
        rejected.append(part.rejection(key, error.reason, error.detail))

    # The last record that was read, for messages.
    latest = deque([""], maxlen=1)

    try:
        for sample in chain(part, job, dropped, services or Services(), reject, latest.append):
            out.write(sample, part.source)
            if sample.columns["id"] not in written:
                written.add(sample.columns["id"])
                tasks[sample.stream.task] += 1
                captions[lower_edge(len(sample.columns["prompt"]), CAPTION_EDGES)] += 1
                if sample.side is not None:
                    sides[lower_edge(sample.side, SIDE_EDGES)] += 1
        streams = out.finish()
    except BaseException as error:
        out.abandon()
        where = f"{part.source}/{part.name}, at the record {latest[0]} or shortly before it"
        if isinstance(error, MemoryError):
            raise WorkerError(
                f"not enough memory in {where}; run the same command again with more memory or fewer --workers, or "
                "write into another directory with a smaller data.prepare.keep.max_pixels"
            ) from error
        error.add_note(f"in {where}")
        raise
    entry = Entry(
        number=number,
        source=part.source,
        part=part.name,
        read=len(written) + len(rejected) + unused.total(),
        streams=streams,
        rejected=tuple(rejected),
        tasks=dict(sorted(tasks.items())),
        unused=dict(sorted(unused.items())),
        sides=dict(sorted(sides.items())),
        captions=dict(sorted(captions.items())),
    )
    entry.save(Ledger(job.root).entry_file(number))
    return entry


class _Writers:
    """One MDS writer for each stream that the partition has records of."""

    def __init__(self, root: Path, number: int):
        self._root, self._number = root, number
        self._writers: dict[StreamSettings, MDSWriter] = {}
        # A unique name: a worker that outlives its killed run cannot write into the next run's files.
        self._aside = f"{partition_name(number)}.{uuid.uuid4().hex}.tmp"

    def _path(self, stream: StreamSettings, name: str) -> Path:
        return self._root / stream.name / name

    def write(self, sample: SizedRecord, source: str) -> None:
        aside = self._path(sample.stream, self._aside)
        writer = self._writers.get(sample.stream)
        if writer is None:
            # Imports torch and transformers, which takes seconds: only a writing process does it.
            from streaming import MDSWriter

            writer = MDSWriter(columns=COLUMNS, out=str(aside), hashes=["sha256"], size_limit=SHARD_BYTES)
            self._writers[sample.stream] = writer
        columns = columns_of(sample, source)
        # A full shard is written here.
        with naming(aside):
            writer.write(columns)

    def finish(self) -> tuple[Shards, ...]:
        """Sync everything to disk and rename it into place."""
        held = []
        for stream in sorted(self._writers, key=lambda s: s.name):
            writer = self._writers[stream]
            aside, place = self._path(stream, self._aside), self._path(stream, partition_name(self._number))
            with naming(aside):
                writer.finish()
            held.append(Shards(settings=stream, shards=tuple(writer.shards)))
            # Before the rename: one that survives a power failure must not point to lost content.
            for path in (*aside.iterdir(), aside):
                sync(path)
            try:
                os.replace(aside, place)
            except OSError:
                # A non-empty directory is never replaced: a worker of a killed run has written the same records.
                if not place.is_dir():
                    raise
                shutil.rmtree(aside)
        return tuple(held)

    def abandon(self) -> None:
        for stream in self._writers:
            shutil.rmtree(self._path(stream, self._aside), ignore_errors=True)
