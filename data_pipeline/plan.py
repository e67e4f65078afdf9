"""Curriculum -> what has to be written, and how it is recorded so that another run can tell whether it is the same."""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from data_pipeline.buckets import Size, buckets
from data_pipeline.records import Source, SourcePartition
from data_pipeline.sources import open_source
from wemmu.config import ConfigError, Curriculum
from wemmu.config.base import leaves
from wemmu.config.prepare import Prepare
from wemmu.config.shards import VERSION, Schema
from wemmu.config.task import FROM_T2I, Task


@dataclass(frozen=True)
class Job:
    """What a data set is made of. `resolutions` says for each task at which of them some stage uses it."""

    root: Path
    prepare: Prepare
    resolutions: dict[Task, tuple[int, ...]]
    # Autoencoder for stored latents; None if none are wanted.
    vae: Path | None

    def source(self, name: str) -> Source:
        return open_source(next(config for config in self.prepare.sources if config.name == name))

    def buckets(self) -> dict[int, tuple[Size, ...]]:
        """The buckets of every resolution."""
        wanted = {r for resolutions in self.resolutions.values() for r in resolutions}
        return {resolution: buckets(resolution, self.prepare.pictures) for resolution in sorted(wanted)}

    def parts(self) -> list[SourcePartition]:
        """Every part of every source, in always the same order; a part's number is its place here."""
        return [part for config in self.prepare.sources for part in open_source(config).parts(self.prepare.partition)]


class Settings(Schema):
    """`settings.json`: equal settings and equal sources give equal records.

    `parts` is the number of parts that the sources had when writing began, `listing` the hash of their names and sizes,
    `folder` the working directory then, from which relative paths are meant.
    """

    version: int
    prepare: dict[str, Any]
    sources: dict[str, int]
    resolutions: dict[Task, tuple[int, ...]]
    parts: int = 0
    listing: str = ""
    # Earlier data sets do not say.
    folder: str = ""
    # Of each source, the number of its files and the hash of their names and sizes.
    files: dict[str, tuple[int, str]] = Field(default_factory=dict)

    @classmethod
    def of(cls, job: Job, parts: list[SourcePartition] | None = None) -> "Settings":
        """With `parts` what goes into the file; without, all that can be told before the sources are listed."""
        prepare = job.prepare.model_dump(mode="json", exclude={"max_damaged", "max_lost_containers"})
        for service in ("caption", "latents"):
            if prepare[service] is not None:
                # Larger batches do the same work.
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
        """One `field: own value, not other value` for each leaf in which the two differ."""
        mine, theirs = (
            dict(leaves(_numbered(s.model_dump(mode="json", exclude={"parts", "listing", "folder", "files"}))))
            for s in (self, other)
        )
        return [
            f"{field}: {mine.get(field, 'absent')}, not {theirs.get(field, 'absent')}"
            for field in {**mine, **theirs}
            if mine.get(field) != theirs.get(field)
            and self._whole(mine.get(field)) != (other._whole(theirs.get(field)) if other.folder else theirs.get(field))
        ]

    def _whole(self, leaf: Any) -> Any:
        """One spelling of a path, from whatever folder it was given."""
        return os.path.normpath(os.path.join(self.folder, leaf)) if isinstance(leaf, str) else leaf


def files_of(job: Job, source: str) -> tuple[int, str]:
    """How many files a source has now, and the hash of their names and sizes; raises as `Source.parts`."""
    found = job.source(source).files()
    return len(found), _digest(found)


def _digest(values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _numbered(tree: Any) -> Any:
    """With a mapping in the place of every list, so that the elements of lists have names, too."""
    tree = dict(enumerate(tree)) if isinstance(tree, list) else tree
    return {key: _numbered(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def plan(curriculum: Curriculum) -> Job:
    """What the stages of `curriculum` need: every task that one mixes, at every resolution at which one does.

    `data.prepare.also` adds tasks.

    Raises:
        ConfigError: if the curriculum prepares no data, or its resolutions do not fit the images' unit.
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
            buckets(resolution, prepare.pictures)
        for task in stage.mixture:
            resolutions.setdefault(task, set()).update(stage.resolutions)
            if task in FROM_T2I:
                resolutions.setdefault(Task.T2I, set()).update(stage.resolutions)
    for task in prepare.also:
        resolutions.setdefault(task, set()).update(px for stage in curriculum.stages for px in stage.resolutions)
    vae = curriculum.backbones.vae if prepare.latents else None
    return Job(curriculum.data.shards, prepare, {t: tuple(sorted(r)) for t, r in sorted(resolutions.items())}, vae)
