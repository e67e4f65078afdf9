"""The shipped example of a stage with several resolutions, with few steps, as a person would run it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
FEW = {
    "data.prepare.sources.0.samples": "{t2i: 40, reconstruction: 16, unconditional: 8}",
    "data.validation": "2",
    "evaluation.prompts": "0",
    "evaluation.benchmarks": "{shapes: {prompts: 2, tasks: [t2i]}, fidelity: {records: 2, tasks: [reconstruction]}}",
    "evaluation.ranks": "2",
    "sampling.steps": "1",
    "sampling.prompts": "[{text: a red circle}]",
    "logging.every": "1",
    "logging.wandb": "disabled",
    "threads": "1",
    "stages.stage2.steps": "6",
    "stages.stage2.global_batch": "4",
    "stages.stage2.optimizer.warmup": "0",
    "stages.stage2.optimizer.decay": "0",
    "stages.stage2.next_resolution": "{samples: 16, plateau: {every: 1, window: 1, min_gain: 0.9, patience: 1}}",
}


@pytest.mark.slow
def test_the_example_rises_and_is_exported_at_its_last_resolution(tmp_path: Path):
    run = tmp_path / "run"
    few = FEW | {"data.shards": str(tmp_path / "shards")}
    overrides = [word for field, value in few.items() for word in ("--set", f"{field}={value}")]
    command = ["-m", "launcher", "run", "configs/shapes/resolutions.yaml", "--out", str(run), *overrides]
    ran = subprocess.run(
        [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr

    lines = [json.loads(line) for line in (run / "stage2" / "resolutions.jsonl").read_text().splitlines()]
    told = [(line["resolution"], line["from_step"], line["to_step"], line["rule"]) for line in lines]
    assert told == [(32, 0, 2, "plateau"), (64, 2, 6, "steps")]
    checkpoints = sorted((run / "stage2" / "checkpoints").glob("step_*/manifest.json"))
    assert [json.loads(file.read_text())["resolution"] for file in checkpoints] == [32, 64]
    # Benchmarks of the curriculum, with two processes each: on the miniature's requests, and on records that nobody
    # trained on.
    cards = {
        name: json.loads((run / f"stage2/benchmarks/{name}/card.json").read_text()) for name in ("shapes", "fidelity")
    }
    assert (cards["shapes"]["score"], cards["shapes"]["n"]) == ("correct", 2)
    assert "reconstruction/psnr" in cards["fidelity"]["scores"]
    assert all("rank 1 of 2" in (run / "stage2" / f"{name}.log").read_text() for name in cards)
    report = (run / "report.html").read_text()
    assert 'href="stage2/benchmarks/fidelity/index.html"' in report
    assert 'href="benchmarks/shapes/index.html"' in (run / "stage2" / "index.html").read_text()
    assert json.loads((run / "export" / "model_index.json").read_text())["resolution"] == 64
