"""One partition: written by one worker, finished or not there, and never taken for finished when it is not."""

import os
import shutil
import uuid
from collections import Counter
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
from data_pipeline.records import Reason, RejectedError, Rejection, SourcePartition
from wemmu.config.shards import COLUMNS, StreamSettings
from wemmu.config.task import Task

if TYPE_CHECKING:
    from streaming import MDSWriter

# A stream's shard is held in memory until it is full, so this times the number of streams is what a worker needs.
SHARD_BYTES = 2**25


def write_partition(
    job: Job,
    number: int,
    part: SourcePartition,
    dropped: frozenset[int] = frozenset(),
    services: Services | None = None,
) -> Entry:
    """Write partition `number`, which holds what `part` gives; returns its ledger entry.

    Shards are written aside, brought to disk and renamed; then the ledger's entry appears in the same way. Whoever is
    killed in between leaves a partition that the ledger does not know, and that the next run writes again.
    """
    out = _Writers(job.root, number)
    rejected: list[Rejection] = []
    # A record may come at several resolutions; it is counted once.
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

    try:
        for sample in chain(part, job, dropped, services or Services(), reject):
            out.write(sample, part.source)
            if sample.columns["id"] not in written:
                written.add(sample.columns["id"])
                tasks[sample.stream.task] += 1
                captions[lower_edge(len(sample.columns["prompt"]), CAPTION_EDGES)] += 1
                if sample.side is not None:
                    sides[lower_edge(sample.side, SIDE_EDGES)] += 1
        streams = out.finish()
    except BaseException:
        out.abandon()
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
        # This attempt's own: a worker that outlives its killed run cannot write into the next run's files.
        self._aside = f"{partition_name(number)}.{uuid.uuid4().hex}.tmp"

    def _path(self, stream: StreamSettings, name: str) -> Path:
        return self._root / stream.name / name

    def write(self, sample: SizedRecord, source: str) -> None:
        writer = self._writers.get(sample.stream)
        if writer is None:
            # Imports torch and transformers, seconds of work: only a process that really writes pays for it.
            from streaming import MDSWriter

            out = str(self._path(sample.stream, self._aside))
            writer = MDSWriter(columns=COLUMNS, out=out, hashes=["sha256"], size_limit=SHARD_BYTES)
            self._writers[sample.stream] = writer
        writer.write(columns_of(sample, source))

    def finish(self) -> tuple[Shards, ...]:
        """Bring everything to disk and to its place."""
        held = []
        for stream in sorted(self._writers, key=lambda s: s.name):
            writer = self._writers[stream]
            writer.finish()
            held.append(Shards(settings=stream, shards=tuple(writer.shards)))
            aside, place = self._path(stream, self._aside), self._path(stream, partition_name(self._number))
            _to_disk(aside)
            try:
                os.replace(aside, place)
            except OSError:
                # A directory with content is never replaced: a worker of a killed run was there first, with the same
                # records.
                if not place.is_dir():
                    raise
                shutil.rmtree(aside)
        return tuple(held)

    def abandon(self) -> None:
        for stream in self._writers:
            shutil.rmtree(self._path(stream, self._aside), ignore_errors=True)


def _to_disk(directory: Path) -> None:
    """A rename that survives a power failure must not name content that did not."""
    for path in (*directory.iterdir(), directory):
        file = os.open(path, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)
