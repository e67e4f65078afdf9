"""One submit, and nobody looks at it again: data, four stages, their scores, the export and the report."""

import json
from pathlib import Path

import pytest

from launcher.ledger import Ledger
from tests.patience import eventually
from tests.slurm.jobs import PATIENCE_S
from tests.slurm.runs import World, assert_equal_weights, launcher, train_here
from tests.training.runs import STAGE
from wemmu.config.task import GENERATION_TASKS

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

STEPS = 6
BASE = {"t2i": 0.5, "reconstruction": 0.5}
MIXTURES = (BASE, BASE, {"t2i": 0.5, "edit": 0.5}, {"t2i": 0.5, "edit": 0.25, "multi_edit": 0.25})
STAGES = [
    STAGE | {"name": f"stage{n}", "resolution": 32 if n == 1 else 64, "steps": STEPS, "mixture": mixture}
    for n, mixture in enumerate(MIXTURES, 1)
]
# A benchmark of the third stage, which the fourth one waits for. Two ranks share its images.
STAGES[2] |= {
    "benchmarks": {"shapes": {"prompts": 2, "batch": 2, "tasks": ["t2i", "edit"], "resamples": 20}},
    "gate": {"benchmarks": [{"benchmark": "shapes", "at_least": 0.0}]},
}
SOURCE = {"kind": "shapes", "samples": dict.fromkeys(map(str, GENERATION_TASKS), 16)}


def over(ledger: Ledger, run: Path) -> bool:
    """Whether the last job has ended; fails the test if a job never will."""
    status = launcher("status", run)
    assert "cancelled" not in status, status
    return any(event.event == "ended" for event in ledger.of("report"))


def test_one_submit_brings_shards_stages_scores_export_and_report(world: World, profile: Path, tmp_path: Path) -> None:
    shards = {"shards": tmp_path / "shards", "prepare": {"sources": [SOURCE]}}
    curriculum = world.curriculum("chain", data=shards, stages=STAGES, evaluation={"prompts": 2, "ranks": 2})
    run, here = tmp_path / "run", tmp_path / "here"
    launcher("submit", curriculum, "--cluster", profile, "--out", run)
    ledger = Ledger(run / "ledger.jsonl")
    try:
        eventually(lambda: over(ledger, run), lambda: launcher("status", run), seconds=PATIENCE_S, every=8)
    finally:
        launcher("cancel", run)

    names = [stage["name"] for stage in STAGES]
    ended = [event for event in ledger.events() if event.event == "ended"]
    assert {event.outcome for event in ended} == {"finished"}
    assert sorted(event.job for event in ended) == sorted(
        ["data", *names, *(f"{name}/evaluation" for name in names), "stage3/shapes", "export", "report"]
    )
    assert next(event for event in ended if event.job == "data").nodes == "n[1-2]"
    assert (run / "export" / "model_index.json").exists()
    assert 'href="stage3/benchmarks/shapes/index.html"' in (run / "report.html").read_text()
    assert json.loads((run / "stage3/benchmarks/shapes/card.json").read_text())["n"] == 4
    assert "rank 1 of 2" in (run / "stage3" / "shapes.log").read_text()
    times = {(event.job, event.event): event.time for event in ledger.events()}
    assert times["stage3/shapes", "ended"] <= times["stage4", "started"]

    # The same without Slurm, from the shards that its two nodes wrote.
    train_here(curriculum, here, names)
    for name in names:
        assert_equal_weights(run, here, name, STEPS)
        asked = json.loads((run / name / "evaluation.json").read_text())["tasks"]["t2i"]["test"]
        assert asked["measures"]["satisfied"]["count"] == 2
