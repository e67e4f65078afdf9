"""One partition: written by one worker, finished or not there, and never taken for finished when it is not."""

import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from data_pipeline.sources import SOURCES
from wemmu.config.shards import COLUMNS, INDEX_FILE, StreamSettings


class Partition(NamedTuple):
    """Partition `number` of the stream with these settings, of the data set in `root`."""

    root: Path
    settings: StreamSettings
    number: int

    @property
    def directory(self) -> Path:
        return self.root / self.settings.name / f"{self.number:05d}"

    @property
    def samples(self) -> int:
        return len(self.settings.records(self.number))


def write_partition(partition: Partition) -> int:
    """Write a partition that is not there yet; returns its number of records."""
    # Imports torch and transformers, seconds of work: only a process that really writes pays for it.
    from streaming import MDSWriter

    settings = partition.settings
    record, size = SOURCES[settings.source].record, (settings.height, settings.width)
    # The name is this attempt's own: a worker that outlives its killed run cannot write into the next run's files.
    aside = partition.directory.with_name(f"{partition.directory.name}.{uuid.uuid4().hex}.tmp")
    with MDSWriter(columns=COLUMNS, out=str(aside), hashes=["sha256"]) as out:
        for number in settings.records(partition.number):
            out.write(record(settings.task, settings.seed, number, size).columns())
    try:
        os.replace(aside, partition.directory)
    except OSError:
        # A directory with content is never replaced: such a worker was there first, with the same records.
        if finished_shards(partition) is None:
            raise
        shutil.rmtree(aside)
    return partition.samples


def finished_shards(partition: Partition) -> list[dict[str, Any]] | None:
    """The MDS index entries of a finished partition; None if it is absent, cut short or damaged in size."""
    try:
        shards = json.loads((partition.directory / INDEX_FILE).read_text())["shards"]
        files = [shard["raw_data"] for shard in shards]
        whole = all((partition.directory / f["basename"]).stat().st_size == f["bytes"] for f in files)
    except (OSError, ValueError, KeyError):
        return None
    return shards if whole and sum(shard["samples"] for shard in shards) == partition.samples else None
