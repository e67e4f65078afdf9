"""What a run folder holds, read as it is: parts that are missing or torn are None or empty, never an error."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from wemmu.config import ConfigError, Curriculum, StageRun, load_curriculum, load_stage, load_stages
from wemmu.config.checkpoints import CHECKPOINTS, MANIFEST, own_checkpoints
from wemmu.config.shards import DataSet, ShardError
from wemmu.evaluation.runner import PICTURES, RESULTS_FILE, SAMPLES_FILE
from wemmu.jsonlines import read_lines


class ReportError(ValueError):
    """A folder of which nothing can be told; the message names it and says what a run folder is."""


@dataclass(frozen=True)
class Sample:
    """One kept request of an evaluation; `entry` is its line in samples.json."""

    entry: dict[str, Any]
    folder: Path

    @property
    def inputs(self) -> list[Path]:
        names = sorted(name for name in self.entry["pictures"] if name.startswith("input"))
        return [self.folder / self.entry["pictures"][name] for name in names]

    @property
    def output(self) -> Path:
        return self.folder / self.entry["pictures"]["output"]

    @property
    def target(self) -> Path | None:
        name = self.entry["pictures"].get("target")
        return self.folder / name if name else None


@dataclass(frozen=True)
class StageRecord:
    """One stage. manifest: of its newest checkpoint. metrics: lines of metrics.jsonl. given_start: weights that were
    named in the curriculum, with `start_manifest` if they are still there; None for what the stage before left."""

    run: StageRun
    folder: Path
    manifest: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    results: dict[str, Any] | None
    samples: list[Sample]
    given_start: Path | None
    start_manifest: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.run.stage.name

    @property
    def step(self) -> int:
        """Step of the newest checkpoint; 0 without one."""
        return int(self.manifest["step"]) if self.manifest else 0

    @property
    def finished(self) -> bool:
        return self.step >= self.run.stage.steps

    def chosen(self, task: str, split: str, count: int) -> list[Sample]:
        """The first `count` kept requests of a task and split."""
        found = (s for s in self.samples if (s.entry["task"], s.entry["split"]) == (task, split))
        return sorted(found, key=lambda s: s.entry["number"])[:count]


@dataclass(frozen=True)
class JobTiming:
    """One job of the launcher. seconds: of all its finished attempts together; outcome: how the last one ended."""

    job: str
    attempts: int
    seconds: float
    outcome: str


@dataclass(frozen=True)
class RunRecord:
    folder: Path
    curriculum: Curriculum | None
    stages: list[StageRecord]
    timings: list[JobTiming]
    data: DataSet | None

    @property
    def name(self) -> str:
        return self.stages[0].run.name


def read_run(folder: Path) -> RunRecord:
    """Read a run folder.

    Raises:
        ReportError: if it holds no stage.
    """
    try:
        curriculum = load_curriculum(folder / "curriculum.yaml")
    except ConfigError:
        curriculum = None
    stages = [_stage(run, home, curriculum) for home, run in load_stages(folder)]
    if not stages:
        raise ReportError(
            f"{folder} is not a run folder: it holds no STAGE/config.yaml. Valid choices: a folder that "
            "`wemmu run CURRICULUM` made"
        )
    return RunRecord(folder, curriculum, stages, _timings(folder / "ledger.jsonl"), _data(stages[0].run.data.shards))


def read_stage(folder: Path) -> StageRecord:
    """Read the folder of one stage.

    Raises:
        ReportError: if it is none.
    """
    try:
        run = load_stage(folder / "config.yaml")
    except ConfigError as error:
        raise ReportError(f"{folder} is not the folder of a stage: {error}") from error
    return _stage(run, folder, None)


def _stage(run: StageRun, home: Path, curriculum: Curriculum | None) -> StageRecord:
    start = _given_start(run, home.parent, curriculum)
    manifests = [_json(directory / MANIFEST) for directory in own_checkpoints(home / CHECKPOINTS)]
    pictures = home / PICTURES
    return StageRecord(
        run=run,
        folder=home,
        manifest=next((m for m in reversed(manifests) if m), None),
        metrics=[line for line in read_lines(home / "metrics.jsonl") if "step" in line],
        results=_json(home / RESULTS_FILE),
        samples=[Sample(entry, pictures) for entry in _json(pictures / SAMPLES_FILE) or []],
        given_start=start,
        start_manifest=_json(start / "manifest.json") if start else None,
    )


def _given_start(run: StageRun, folder: Path, curriculum: Curriculum | None) -> Path | None:
    """The launcher points a stage without `start` at the stage before; the curriculum alone tells the two apart."""
    start = run.stage.start
    if curriculum is not None:
        start = next((stage.start for stage in curriculum.stages if stage.name == run.stage.name), start)
    elif start is not None and start.resolve().is_relative_to(folder.resolve()):
        start = None
    return start


def _timings(ledger: Path) -> list[JobTiming]:
    """Time by job, in the order in which jobs first started; attempts without an end count as broken off."""
    events = [e for e in read_lines(ledger) if {"job", "event", "time"} <= e.keys() and e["job"] != "report"]
    timings = []
    for job in dict.fromkeys(event["job"] for event in events):
        seconds, began, outcome, attempts = 0.0, None, "", 0
        for event in (e for e in events if e["job"] == job):
            at = datetime.fromisoformat(event["time"])
            if event["event"] == "started":
                began, outcome, attempts = at, "has not ended", attempts + 1
            elif event["event"] != "changed" and began is not None:
                seconds, outcome, began = seconds + (at - began).total_seconds(), event.get("reason", "ended"), None
        timings.append(JobTiming(job, attempts, seconds, outcome))
    return timings


def _data(shards: Path) -> DataSet | None:
    try:
        return DataSet.at(shards)
    except (ShardError, OSError):
        return None


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
