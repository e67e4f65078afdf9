"""The page of a stage, from a folder that the test wrote: whole, and with next to nothing in it."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.evaluation.fakes import write_run
from tests.report.pages import Page
from wemmu.evaluation.run_charts import reward_charts
from wemmu.evaluation.run_record import ReportError
from wemmu.evaluation.stage_page import SHEETS, write_page

MACHINE = {"tokens_per_s": 4e4, "flops_per_s": 4e14, "mfu": 0.4, "data_wait_share": 0.01, "lr": 1e-4, "dit_lr": 1e-5}
MEMORY = {"memory/host_gb": 9.0, "memory/gpu_allocated_gb": 50.0, "memory/gpu_reserved_gb": 60.0}
REQUEUED = (
    {"event": "ended", "attempt": 1, "from_step": 0, "to_step": 40, "reason": "was pre-empted & saved its state"},
    {"event": "requeued", "attempt": 1, "slurm": 812, "nodes": "node[1-2]"},
    {"event": "started", "attempt": 2, "from_step": 40},
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stage that was requeued once."""
    run = write_run(tmp_path_factory.mktemp("page") / "run")
    stage = run / "stage4"
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()[:-1]]
    shares = {"share/t2i": 0.25, "share/edit": 0.75}
    text = "".join(json.dumps(line | MACHINE | MEMORY | shares) + "\n" for line in lines)
    (stage / "metrics.jsonl").write_text(text)
    (stage / "samples").mkdir()
    for step in range(1, 31):
        Image.new("RGB", (8, 8), (step, 0, 0)).save(stage / "samples" / f"step_{step:08d}.png")
    (stage / "environment.jsonl").write_text('{"from_step": 0, "commit": "abc"}\n{"from_step": 40, "commit": "def"}\n')
    with (run / "ledger.jsonl").open("a") as ledger:
        for event in REQUEUED:
            ledger.write(json.dumps({"job": "stage4", "time": "2030-01-01T01:02:03+00:00", **event}) + "\n")
    return stage


def page_of(folder: Path) -> Page:
    return Page(write_page(folder).read_text())


def test_the_page_needs_nothing_else(whole: Path):
    html = write_page(whole).read_text()
    page = Page(html)
    assert page.open == []
    assert page.links
    # Besides the result card of the stage's evaluation, which is in the same folder.
    assert all(link.startswith(("data:image/png;base64,", "#", "evaluation/")) for link in page.links)
    assert not re.findall(r"https?://", re.sub(r'xmlns(:\w+)?="[^"]*"', "", html))


def test_the_page_tells_of_curves_machine_samples_and_events(whole: Path):
    text = page_of(whole).text
    curves = ["loss by task", "loss by noise level", "gradient norm", "share of each task", "samples per second"]
    for told in (*curves, "thousand tokens", "% (MFU)", "peak GPU memory", "waiting for data", "learning rate"):
        assert told in text, told
    assert "was pre-empted & saved its state" in text
    assert "0 → 40" in text
    assert "node[1-2], job 812" in text
    assert "stage1" not in text.split("Events")[1].split("Configuration")[0]
    assert "Attempt 2, from step 40" in text
    assert "wandb: auto" in text


def test_of_many_samples_the_first_the_last_and_some_between_are_shown(whole: Path):
    html = write_page(whole).read_text()
    steps = [int(step) for step in re.findall(r"<figcaption>step (\d+)<", html)]
    assert len(steps) == SHEETS
    assert (steps[0], steps[-1]) == (1, 30)
    assert steps == sorted(set(steps))


def test_a_cpu_run_shows_what_it_has(whole: Path, tmp_path: Path):
    """No peak is stated of a CPU, so there is no MFU, but the FLOPs are known."""
    stage = shutil.copytree(whole.parent, tmp_path / "run") / "stage4"
    lines = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    gone = ("mfu", "memory/gpu")
    kept = [{key: value for key, value in line.items() if not key.startswith(gone)} for line in lines]
    (stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    text = page_of(stage).text
    assert "model TFLOP per second" in text
    assert "peak host memory" in text
    assert "MFU" not in text


def test_a_stage_before_its_first_step_has_a_page(whole: Path, tmp_path: Path):
    folder = tmp_path / "stage4"
    folder.mkdir()
    shutil.copy(whole / "config.yaml", folder)
    text = page_of(folder).text
    assert "Step 0 of 100" in text
    assert "no metrics yet" in text
    assert "No sample images yet" in text
    assert "not started by the launcher" in text


def test_records_of_earlier_versions_have_a_page(tmp_path: Path):
    run = write_run(tmp_path / "run")
    assert "samples per second" in page_of(run / "stage1").text


def test_a_folder_of_something_else_is_refused(tmp_path: Path):
    with pytest.raises(ReportError, match="is not the folder of a stage"):
        write_page(tmp_path)


def test_what_learns_from_rewards_has_charts_of_them() -> None:
    line = {"step": 1, "reward": 0.5, "reward/other": 0.4, "length": 9.0, "length/min": 3.0, "length/max": 12.0}
    line |= {"entropy": 1.0, "time/rollout_s": 2.0, "time/reward_s": 3.0, "time/update_s": 1.0}
    drawn = reward_charts(SimpleNamespace(metrics=[line, line | {"step": 2}]))
    assert [chart.count("<i ") for chart in drawn] == [2, 3, 0, 3]
    assert reward_charts(SimpleNamespace(metrics=[{"step": 1, "loss": 0.1}])) == []
