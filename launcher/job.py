"""A job as a value, and what the files of a run folder say about it. No config here, so that it loads at once."""

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

# In the folder of a stage with a ladder: where each rung ended, and why (`wemmu.training.ladder`).
RUNGS = "rungs.jsonl"


@dataclass(frozen=True)
class Job:
    """One command of a chain; its other files lie in the folder of its log.

    products: what is there when the job is finished, whole, because each appears by rename or is written last. A job
    without products judges for itself what is left to do and is always run. inputs: files which make a product out of
    date when they are newer. steps: of a training job, None for others. after: jobs that must be finished first. ranks:
    processes that run the command together; hang_after: seconds without a sign of life after which one of them is hung.
    script: the file of `slurm/` that runs it on a cluster. gate: what must hold before it begins. rung: resolution of a
    rung of a ladder; jobs of one stage share its folder and its steps, and `steps` is where this one ends at most.
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
    rung: int | None = None

    @property
    def folder(self) -> Path:
        return self.log.parent


def checkpoint(stage_folder: Path, step: int) -> Path:
    """Where the trainer leaves the checkpoint of `step`; the directory appears by rename, with its manifest in it."""
    return stage_folder / CHECKPOINTS / directory_name(step)


def last_step(job: Job) -> int | None:
    """Step of the newest whole checkpoint of a training job (0 if there is none); None for other jobs."""
    if job.steps is None:
        return None
    steps = (manifest_step(directory) for directory in own_checkpoints(job.folder / CHECKPOINTS))
    return max((step for step in steps if step is not None), default=0)


def rung_end(job: Job) -> int | None:
    """The step at which a rung ended; None while it has not, and for jobs that are no rung."""
    file = job.folder / RUNGS
    if job.rung is None or not file.exists():
        return None
    lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return next((line["to_step"] for line in lines if line["resolution"] == job.rung), None)


def missing(job: Job) -> tuple[Path, ...]:
    """Products that are absent or torn; of a rung also the list of rungs that does not tell of its end."""
    lacking = tuple(product for product in job.products if not _is_whole(product))
    if job.rung is None or lacking:
        return lacking
    end, saved = rung_end(job), last_step(job)
    return () if end is not None and saved is not None and saved >= end else (job.folder / RUNGS,)


def is_finished(job: Job) -> bool:
    """Whether nothing is left to do: every product is whole and none is older than an input."""
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
