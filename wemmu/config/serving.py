"""Checks whether the stages can read a data set, from the record of its streams alone.

The data job, the launcher, the doctor and the loader share this check, so they agree.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from wemmu.config.prepare import Prepare
from wemmu.config.schema import Curriculum
from wemmu.config.shards import (
    DATASET_FILE,
    INDEX_FILE,
    REJECTED_FILE,
    REWRITE,
    ShardError,
    Stream,
    written_anew,
)
from wemmu.config.stage import ResolutionStep, Stage
from wemmu.config.task import FROM_T2I, Task

# The smallest stream with a held-out record has this many records.
SMALLEST = 4


@dataclass(frozen=True)
class Need:
    """A task of a stage at one of its resolutions; held_out: whether validation needs records of it."""

    task: Task
    resolution: int
    stage: str = ""
    held_out: bool = False

    def __str__(self) -> str:
        validated = f", {SMALLEST} records or more for its validation" if self.held_out else ""
        return f"{self.stage}{': ' * bool(self.stage)}{self.task} at {self.resolution} px{validated}"


def needs(stages: Iterable[Stage | ResolutionStep]) -> list[Need]:
    """Return what the stages read, in order."""
    return [
        Need(task, resolution, stage.name, stage.has_plateau)
        for stage in stages
        for resolution in (stage.resolutions if isinstance(stage, Stage) else (stage.resolution,))
        for task in stage.mixture
    ]


def sources_of(task: Task) -> tuple[Task, ...]:
    """Return the tasks whose records can serve `task`, best first."""
    return (task, Task.T2I) if task in FROM_T2I else (task,)


def serving(streams: Sequence[Stream], task: Task, resolution: int) -> list[Stream]:
    """Return the streams for `task` at `resolution`: those of the first task in `sources_of` that has any."""
    found = (
        [s for s in streams if (s.settings.task, s.settings.resolution) == (source, resolution)]
        for source in sources_of(task)
    )
    return next((streams for streams in found if streams), [])


def lacking(streams: Sequence[Stream], required: Iterable[Need]) -> list[Need]:
    """Return the needs for which these streams have no record."""
    return [
        need
        for need in required
        if not any(s.samples >= SMALLEST or not need.held_out for s in serving(streams, need.task, need.resolution))
    ]


def check_readable(where: Path | str, streams: Sequence[Stream], required: Iterable[Need]) -> None:
    """Check that a data set holds everything that the stages read.

    Raises:
        ShardError: names every missing stage, task and resolution, and the streams of the data set.
    """
    if not (lacks := lacking(streams, required)):
        return
    there = ", ".join(f"{s.settings.name} ({s.samples})" for s in streams)
    raise ShardError(
        f"the data set {where} has no record for {'; '.join(map(str, lacks))}. It has {there or 'no stream'}. Write "
        f"one that has them (its {REJECTED_FILE} lists rejected records and reasons), or change the stage's mixture or "
        "resolution"
    )


def read_index(root: Path, stream: Stream) -> bytes:
    """Read the index of a stream in the data set at `root`.

    Raises:
        ShardError: if it is not the recorded one.
    """
    path, state = root / stream.settings.name / INDEX_FILE, "missing"
    if path.exists():
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() == stream.files[INDEX_FILE]:
            return content
        state = "damaged (its sha256 differs)"
    raise ShardError(
        f"the shard index {path} is {state}; to write it again, delete {root / DATASET_FILE} and {REWRITE}"
    )


def fault_of(shard: Path, size: int) -> str | None:
    """Return the fault of a shard file that must have `size` bytes, without reading it; None if there is none."""
    found = shard.stat().st_size if shard.exists() else None
    if found == size:
        return None
    return "missing" if found is None else f"damaged (it has {found} bytes, not {size})"


def check_files(root: Path, streams: Iterable[Stream], shards_too: bool) -> None:
    """Check the files of the data set at `root` like the loader: indices and sizes of shards.

    Raises:
        ShardError: names the first missing or damaged file and the number of others.
    """
    lost = []
    for stream in streams:
        index = json.loads(read_index(root, stream))
        for raw in (shard["raw_data"] for shard in index["shards"]) if shards_too else ():
            shard = root / stream.settings.name / raw["basename"]
            if fault := fault_of(shard, raw["bytes"]):
                lost.append((stream, raw["basename"], f"the shard file {shard} is {fault}"))
    if lost:
        stream, name, fault = lost[0]
        more = f", and {len(lost) - 1} more are missing or damaged" if lost[1:] else ""
        raise ShardError(f"{fault}{more}; {written_anew(root, stream.settings.name, name)}")


def check_preparable(curriculum: Curriculum, prepare: Prepare) -> None:
    """Check, before reading or writing, that some source can have records for every stage.

    Raises:
        ShardError: names every missing stage, task and resolution, and the tasks of the sources.
    """
    given = {task for source in prepare.sources for task in source.tasks}
    if not (lacks := [need for need in needs(curriculum.stages) if not given & set(sources_of(need.task))]):
        return
    there = ", ".join(f"{source.name}: {', '.join(source.tasks)}" for source in prepare.sources)
    raise ShardError(
        f"no source of data.prepare has records for {'; '.join(map(str, lacks))}. The sources have {there}. Add one "
        "that has them, or change the stage's mixture"
    )
