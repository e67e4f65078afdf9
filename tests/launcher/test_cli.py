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
from tests.launcher.test_plan import curriculum
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
