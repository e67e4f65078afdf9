"""Reads a run folder; missing or truncated files become None or empty, never an error."""

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from wemmu.config import ConfigError, Curriculum, StageRun, load_curriculum, load_stage, load_stages
from wemmu.config.benchmarks import CARD, EVALUATION, RESULTS, SAMPLES, card_file
from wemmu.config.checkpoints import CHECKPOINTS, MANIFEST, own_checkpoints, sheets
from wemmu.config.shards import DataSet, ShardError
from wemmu.jsonlines import read_lines

# Result cards in the folder of a stage: of its evaluation, then of its benchmarks.
CARDS = (f"{EVALUATION}/{CARD}", str(card_file(Path(), "*")))


class ReportError(ValueError):
    """The folder is not a run folder or a stage's folder; the message says what is expected."""


class KeptRequest(NamedTuple):
    """One kept request of an evaluation: its line in samples.json, and its image files by their names."""

    entry: dict[str, Any]
    files: dict[str, Path]

    @property
    def inputs(self) -> list[Path]:
        return [self.files[name] for name in sorted(self.files) if name.startswith("input")]


@dataclass(frozen=True)
class StageRecord:
    """One stage. manifest: of its newest checkpoint. metrics: lines of metrics.jsonl. cards: folder -> result card.

    given_start: weights that were named in the curriculum, with `start_manifest` if they still exist; None if it starts
    from the previous stage.
    """

    run: StageRun
    folder: Path
    manifest: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    results: dict[str, Any] | None
    samples: list[KeptRequest]
    cards: dict[str, dict[str, Any]]
    given_start: Path | None
    start_manifest: dict[str, Any] | None

    @property
    def name(self) -> str:
        return self.run.stage.name

    @property
    def step(self) -> int:
        """Step of the newest checkpoint; 0 without one."""
        return int(self.manifest["step"]) if self.manifest else 0

    def sheets(self) -> list[Path]:
        """Return the sheets of the fixed prompts, oldest first."""
        return sheets(self.folder)

    def chosen(self, task: str, split: str, count: int) -> list[KeptRequest]:
        """Return the first `count` kept requests of a task and split."""
        found = (s for s in self.samples if (s.entry["task"], s.entry["split"]) == (task, split))
        return sorted(found, key=lambda s: s.entry["number"])[:count]


class JobTiming(NamedTuple):
    """One job of the launcher. seconds: the sum over its finished attempts; outcome: the end of the last one."""

    job: str
    attempts: int
    seconds: float
    outcome: str


class RunRecord(NamedTuple):
    folder: Path
    curriculum: Curriculum | None
    stages: list[StageRecord]
    timings: list[JobTiming]
    data: DataSet | None


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
            "`wemmu run CURRICULUM.yaml` wrote"
        )
    try:
        data = DataSet.at(stages[0].run.data.shards)
    except (ShardError, OSError):
        data = None
    return RunRecord(folder, curriculum, stages, _timings(folder / "ledger.jsonl"), data)


def read_stage(folder: Path) -> StageRecord:
    """Read the folder of one stage.

    Raises:
        ReportError: if it is not the folder of a stage.
    """
    try:
        return _stage(load_stage(folder / "config.yaml"), folder, None)
    except ConfigError as error:
        raise ReportError(f"{folder} is not the folder of a stage: {error}") from error


def _stage(run: StageRun, home: Path, curriculum: Curriculum | None) -> StageRecord:
    # The launcher sets `start` to the previous stage if it is absent; only the curriculum shows which it was.
    start = run.stage.start
    if curriculum is not None:
        start = next((stage.start for stage in curriculum.stages if stage.name == run.stage.name), start)
    elif start is not None and start.resolve().is_relative_to(home.parent.resolve()):
        start = None
    manifests = (_json(directory / MANIFEST) for directory in reversed(own_checkpoints(home / CHECKPOINTS)))
    return StageRecord(
        run=run,
        folder=home,
        manifest=next(filter(None, manifests), None),
        metrics=[line for line in read_lines(home / "metrics.jsonl") if "step" in line],
        results=_json(home / RESULTS),
        samples=read_samples(home / EVALUATION),
        cards={
            str(file.parent.relative_to(home)): card
            for form in CARDS
            for file in sorted(home.glob(form))
            if (card := _json(file))
        },
        given_start=start,
        start_manifest=_json(start / MANIFEST) if start else None,
    )


def read_samples(folder: Path) -> list[KeptRequest]:
    """Return the kept requests whose images exist; earlier versions called the images pictures."""
    entries = _json(folder / SAMPLES) or []
    kept = [
        KeptRequest(e, {k: folder / name for k, name in (e.get("images") or e["pictures"]).items()}) for e in entries
    ]
    return [sample for sample in kept if all(file.is_file() for file in sample.files.values())]


def _timings(ledger: Path) -> list[JobTiming]:
    """Return times by job, in order of the first start; an attempt without an end counts as interrupted."""
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


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
