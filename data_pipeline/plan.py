"""Curriculum -> the job of the writer, and its settings as recorded for the next run."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from data_pipeline.records import RawRecord, Rejection, Source, SourcePartition, reading
from data_pipeline.sources import open_source
from wemmu.config import ConfigError, Curriculum
from wemmu.config.base import differences
from wemmu.config.buckets import Size, buckets
from wemmu.config.prepare import Prepare
from wemmu.config.shards import VERSION, Schema
from wemmu.config.task import FROM_T2I, Task
from wemmu.config.upgrade import renamed


@dataclass(frozen=True)
class Job:
    """The definition of a data set; `resolutions` maps each task to the resolutions at which a stage uses it."""

    root: Path
    prepare: Prepare
    resolutions: dict[Task, tuple[int, ...]]
    # Autoencoder for stored latents, or None.
    vae: Path | None

    def source(self, name: str) -> Source:
        return open_source(next(config for config in self.prepare.sources if config.name == name))

    def tasks_of(self, name: str) -> tuple[Task, ...]:
        """Return the tasks that a source can have records of."""
        return next(config.tasks for config in self.prepare.sources if config.name == name)

    def buckets(self) -> dict[int, tuple[Size, ...]]:
        """Return the buckets of every resolution."""
        used = {r for resolutions in self.resolutions.values() for r in resolutions}
        return {resolution: buckets(resolution, self.prepare.images) for resolution in sorted(used)}

    def parts(self) -> list[SourcePartition]:
        """Return every part of every source in a fixed order; a part's number is its index here."""
        found = []
        for config in self.prepare.sources:
            with reading(f"the source {config.name}"):
                found += open_source(config).parts(self.prepare.partition)
        return found

    def read(self, part: SourcePartition) -> Iterator[RawRecord | Rejection]:
        """Yield what the source of a part yields; raises WorkerError if its server fails."""
        with reading(f"{part.source}/{part.name}"):
            yield from self.source(part.source).read(part)


class Settings(Schema):
    """`settings.json`: equal settings and equal sources give equal records.

    `parts` is the number of parts when writing began, `listing` the hash of their names and sizes, `folder` the working
    directory then, from which relative paths start.
    """

    version: int
    prepare: dict[str, Any]
    sources: dict[str, int]
    resolutions: dict[Task, tuple[int, ...]]
    parts: int = 0
    listing: str = ""
    # Absent in earlier data sets.
    folder: str = ""
    # Source -> number of files, hash of their names and sizes.
    files: dict[str, tuple[int, str]] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _upgraded(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        tree, _ = renamed({"data": {"prepare": values.get("prepare")}})
        return {**values, "prepare": tree["data"]["prepare"]}

    @classmethod
    def of(cls, job: Job, parts: list[SourcePartition] | None = None) -> "Settings":
        """Return the settings; without `parts`, only what is known before the sources are listed."""
        prepare = job.prepare.model_dump(mode="json", exclude={"max_damaged", "max_lost_containers"})
        for source in prepare["sources"]:
            # Earlier data sets do not say these.
            for field, default in (("task", Task.T2I), ("sizes", [])):
                if source.get(field) == default:
                    del source[field]
        for service in ("caption", "latents"):
            if prepare[service] is not None:
                # The batch size does not change the result.
                del prepare[service]["batch"]
        settings = cls(
            version=VERSION,
            prepare=prepare,
            sources={config.name: job.source(config.name).version for config in job.prepare.sources},
            resolutions=job.resolutions,
            folder=str(Path.cwd()),
        )
        if parts is None:
            return settings
        listing = _digest([(part.source, part.name, part.place) for part in parts])
        files = {config.name: files_of(job, config.name) for config in job.prepare.sources}
        return settings.model_copy(update={"parts": len(parts), "listing": listing, "files": files})

    def differences(self, other: "Settings") -> list[str]:
        """Return `field: own value, not other value` for each leaf that differs."""
        mine, theirs = (
            s.model_dump(mode="json", exclude={"parts", "listing", "folder", "files"}) for s in (self, other)
        )
        return [
            f"{field}: {value}, not {before}"
            for field, value, before in differences(mine, theirs, (self.folder, other.folder))
        ]


def files_of(job: Job, source: str) -> tuple[int, str]:
    """Return the number of a source's files and the hash of their names and sizes; raises as `Source.parts`."""
    found = job.source(source).files()
    return len(found), _digest(found)


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def plan(curriculum: Curriculum) -> Job:
    """Return the job for `curriculum`: every task of its stages at every resolution of that task.

    `data.prepare.also` adds tasks.

    Raises:
        ConfigError: if the curriculum prepares no data, or a resolution is not a multiple of the unit.
    """
    prepare = curriculum.data.prepare
    if prepare is None:
        raise ConfigError(
            f"the curriculum {curriculum.name} has no data.prepare, so there is nothing to write; its stages read "
            f"{curriculum.data.shards} as it is"
        )
    resolutions: dict[Task, set[int]] = {}
    for stage in curriculum.stages:
        for resolution in stage.resolutions:
            buckets(resolution, prepare.images)
        for task in stage.mixture:
            resolutions.setdefault(task, set()).update(stage.resolutions)
            if task in FROM_T2I:
                resolutions.setdefault(Task.T2I, set()).update(stage.resolutions)
    for task in prepare.also:
        resolutions.setdefault(task, set()).update(px for stage in curriculum.stages for px in stage.resolutions)
    vae = curriculum.backbones.vae if prepare.latents else None
    return Job(curriculum.data.shards, prepare, {t: tuple(sorted(r)) for t, r in sorted(resolutions.items())}, vae)
