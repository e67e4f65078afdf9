"""What a person sees: plan, refusals, status."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from launcher import folder
from launcher.cli import app
from launcher.ledger import Event, Ledger
from launcher.plan import chain
from tests.launcher.test_plan import curriculum, ended, ladder
from wemmu.config import Curriculum, dump


@pytest.fixture
def runnable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Curriculum:
    """A curriculum that passes every check, in a working directory of its own, as x.yaml."""
    monkeypatch.chdir(tmp_path)
    for needed in ("vlm", "sana", "elsewhere"):
        (tmp_path / needed).mkdir()
    dump(curriculum(), tmp_path / "x.yaml")
    return curriculum()


def call(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def test_the_launcher_loads_without_the_heavy_libraries():
    heavy = "{'torch', 'transformers', 'ray', 'numpy'}"
    code = f"import sys, launcher.cli; sys.exit(str({heavy} & set(sys.modules) or ''))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr.strip() == ""


def test_a_dry_run_shows_the_plan_and_writes_nothing(runnable: Curriculum, tmp_path: Path):
    before = set(tmp_path.rglob("*"))
    result = call("run", "x.yaml", "--dry-run", "--set", "stages.b.steps=71")
    assert result.exit_code == 0
    for shown in ("32 px", "4 x 1", "71", "step_00000030", "backbones", "elsewhere"):
        assert shown in result.output
    assert set(tmp_path.rglob("*")) == before


def test_what_is_missing_is_refused_before_anything_starts(runnable: Curriculum, tmp_path: Path):
    (tmp_path / "sana").rmdir()
    result = call("run", "x.yaml")
    assert result.exit_code == 2
    assert "backbones.sana: sana is not a directory" in result.stderr
    assert not (tmp_path / "runs").exists()


def test_a_changed_config_is_refused_and_the_run_is_not_touched(runnable: Curriculum, tmp_path: Path):
    run = tmp_path / "runs" / "x"
    run.mkdir(parents=True)
    folder.write(runnable, run)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    result = call("run", "x.yaml", "--set", "stages.*.global_batch=8")
    assert result.exit_code == 2
    assert "stages.c.global_batch: 4 -> 8" in result.stderr
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before


def test_an_invalid_override_is_refused_with_the_choices(runnable: Curriculum):
    result = call("run", "x.yaml", "--set", "stages.z.steps=1")
    assert result.exit_code == 2
    assert "valid choices: a, b, c, d" in result.stderr


def test_status_tells_each_kind_of_job_apart(runnable: Curriculum, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    folder.write(runnable, run)
    [manifest] = chain(runnable, run)[1].products
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    ledger = Ledger(run / "ledger.jsonl")
    ledger.append(Event("a", 1, "started", 1))
    ledger.append(Event("a", 1, "ended", 1, 0, 0, 30, "finished"))
    ledger.append(Event("b", 1, "started", 1))
    ledger.append(Event("b", 1, "ended", 1, 75, 0, 20, "was interrupted and saved its state"))
    # No process has this id: the kernel's highest is 2^22.
    ledger.append(Event("c", 1, "started", 2**30))
    logged = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in (10, 20))
    (run / "b" / "metrics.jsonl").write_text(logged + '{"step": 30, "lo')

    lines = {line.split()[0]: line for line in call("status", str(run)).output.splitlines()}
    assert "finished" in lines["a"]
    assert "30/30" in lines["a"]
    assert "was interrupted" in lines["b"]
    assert "0.0500" in lines["b"]
    assert "broken off" in lines["c"]
    assert "waiting" in lines["d"]
    assert "waiting" in lines["report"]


def test_a_dry_run_shows_what_each_rung_of_a_ladder_is(runnable: Curriculum, tmp_path: Path):
    dump(ladder(), tmp_path / "ladder.yaml")
    result = call("run", "ladder.yaml", "--dry-run", "--set", "memory.micro_batch=4")
    assert result.exit_code == 0
    row = {line.split()[0]: line.split() for line in result.output.splitlines() if line.strip()}
    assert row["resolution"][1:] == ["32", "px", "32", "px", "48", "px", "64", "px", "32", "px", "32", "px"]
    assert " ".join(row["batch"][1:]) == "4 x 1 4 x 1 1 x 4 1 x 4 4 x 1 4 x 1"
    assert " ".join(row["steps"][1:]) == "30 0 to 10 10 to 20 20 to 70 30 30"


def test_status_has_a_line_for_each_rung(runnable: Curriculum, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    folder.write(ladder(), run)
    ended(run, 32, 8)
    (run / "b" / "checkpoints" / "step_00000012").mkdir()
    (run / "b" / "checkpoints" / "step_00000012" / "manifest.json").write_text("{}")
    told = [{"step": 8, "loss": 0.5}, {"step": 8, "validation_loss": 3.0}, {"step": 12, "loss": 0.25}]
    (run / "b" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    ledger = Ledger(run / "ledger.jsonl")
    for name in ("b@32", "b@48"):
        ledger.append(Event(name, 1, "started", 1))
    ledger.append(Event("b@48", 1, "ended", 1, 75, 8, 12, "was interrupted and saved its state"))

    lines = {line.split()[0]: line for line in call("status", str(run)).output.splitlines()}
    assert "finished" in lines["b@32"]
    assert "8/8" in lines["b@32"]
    assert "0.5000" in lines["b@32"]
    assert "was interrupted" in lines["b@48"]
    assert "12/20" in lines["b@48"]
    assert "0.2500" in lines["b@48"]
    assert "waiting" in lines["b@64"]
    assert "/" not in lines["b@64"]


def test_the_log_of_a_rung_is_found_by_its_name(runnable: Curriculum, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    folder.write(ladder(), run)
    (run / "b" / "log-48.txt").write_text("what b@48 said")
    assert call("logs", str(run), "b@48").output == "what b@48 said"
    assert "valid choices: data, a, a/evaluation, b@32, b@48" in call("logs", str(run), "b@96").stderr
