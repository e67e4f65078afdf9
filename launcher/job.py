"""A job as a value, and its state according to the run folder."""

import json
from dataclasses import dataclass
from pathlib import Path

from launcher.gate import Gate
from wemmu.config.checkpoints import (
    CHECKPOINTS,
    MANIFEST,
    directory_name,
    manifest_step,
    own_checkpoints,
    says_its_step,
)
from wemmu.config.next_resolution import record_file
from wemmu.jsonlines import read_lines


@dataclass(frozen=True)
class Job:
    """One command of a chain; its other files lie in the folder of its log.

    products: files of a finished job. They are whole, because each is renamed into place or written last. A job without
    products always runs and decides itself what is left to do. inputs: if one is newer, a product is out of date.
    steps: of a training job, else None. after: jobs that must finish first. ranks: processes that run the command.
    hang_after: seconds without a sign of life after which a rank counts as hung. script: file of `slurm/` that runs the
    job on a cluster. gate: conditions before it begins. resolution: if the stage has several; these jobs share the
    stage's folder and steps, and `steps` is where this one ends at the latest.
    """

    name: str
    command: tuple[str, ...]
    log: Path
    products: tuple[Path, ...] = ()
    inputs: tuple[Path, ...] = ()
    steps: int | None = None
    after: tuple[str, ...] = ()
    ranks: int = 1
    hang_after: float | None = None
    script: str = ""
    gate: Gate | None = None
    resolution: int | None = None

    @property
    def evaluates(self) -> bool:
        """Whether it scores a stage: what follows waits for it only where a gate reads its scores."""
        return self.script == "evaluate.sh"

    @property
    def folder(self) -> Path:
        return self.log.parent


def checkpoint(stage_folder: Path, step: int) -> Path:
    """Return the manifest of the checkpoint of `step`; the trainer renames the whole directory into place."""
    return stage_folder / CHECKPOINTS / directory_name(step)


def last_step(job: Job) -> int | None:
    """Step of the newest whole checkpoint of a training job (0 if there is none); None for other jobs."""
    if job.steps is None:
        return None
    steps = (manifest_step(directory) for directory in own_checkpoints(job.folder / CHECKPOINTS))
    return max((step for step in steps if step is not None), default=0)


def resolution_end(job: Job) -> int | None:
    """Return the step at which a resolution of a stage ended; None before that, and for other jobs."""
    if job.resolution is None:
        return None
    lines = read_lines(record_file(job.folder))
    return next((line["to_step"] for line in lines if line["resolution"] == job.resolution), None)


def missing(job: Job) -> tuple[Path, ...]:
    """Return missing or truncated products; also the list of resolutions if it lacks the end of this one."""
    lacking = tuple(product for product in job.products if not _is_whole(product))
    if job.resolution is None or lacking:
        return lacking
    end, saved = resolution_end(job), last_step(job)
    return () if end is not None and saved is not None and saved >= end else (record_file(job.folder),)


def is_finished(job: Job) -> bool:
    """Return whether every product is complete and none is older than an input."""
    if not job.products or missing(job):
        return False
    made = min(product.stat().st_mtime_ns for product in job.products)
    return all(not file.exists() or file.stat().st_mtime_ns <= made for file in job.inputs)


def _is_whole(file: Path) -> bool:
    if file.name == MANIFEST and not says_its_step(file.parent):
        return False
    try:
        content = file.read_bytes()
        if file.suffix == ".json":
            json.loads(content)
    except (OSError, ValueError):
        return False
    return bool(content)
