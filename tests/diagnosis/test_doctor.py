"""The command, on this machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from tests.diagnosis.test_checks import KEY, program
from tests.planning.worlds import MINIATURE, ROOT
from wemmu.diagnosis.findings import Finding
from wemmu.diagnosis.report import as_json, render


def doctor(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wemmu.doctor", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_doctor_finds_only_what_is_truly_wrong_here_and_tells_no_secret(tmp_path: Path):
    program(tmp_path, "sinfo", "echo slurm 1.0 up")
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = doctor(MINIATURE, "--json", PATH=path, WANDB_API_KEY=KEY, OMP_NUM_THREADS="1")
    assert "Traceback" not in done.stderr
    assert KEY not in done.stdout + done.stderr
    told = json.loads(done.stdout)
    problems = {one["name"]: one for one in told["findings"] if one["status"] == "problem"}
    # Where the checkout is newer than what is installed, that is truly wrong.
    stale = {name for name, one in problems.items() if "older state" in one["found"]}
    assert problems.keys() == stale
    assert done.returncode == bool(stale)
    assert told["ok"] is not bool(stale)
    assert {one["area"] for one in told["findings"]} == {
        *("software", "devices and kernels", "processes", "host", "services", "curriculum")
    }
    assert all(one["remedy"] for one in told["findings"] if one["status"] != "ok")


@pytest.mark.slow
def test_a_curriculum_that_is_none_is_an_answer_not_a_traceback(tmp_path: Path):
    (invalid := tmp_path / "invalid.yaml").write_text("name: x", encoding="utf-8")
    done = doctor(invalid)
    assert done.returncode == 1
    assert "invalid.yaml" in done.stdout.replace("\n", "")
    assert "Traceback" not in done.stderr


def test_problems_come_first_with_their_remedies_and_what_is_fine_only_when_asked_for():
    report = {
        "first": [Finding("one", "problem", "it has [bold] brackets", "mend it"), Finding("two", "ok", "fine")],
        "second": [Finding("three", "warning", "slow", "wait")],
    }
    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(render(report))
    text = console.export_text()
    assert text.index("problem: one: it has [bold] brackets\n    remedy: mend it") < text.index("warning: three")
    assert text.rstrip().endswith("1 ok (--all lists them), 1 problem to solve first")
    assert "two" not in text
    console.print(render(report, every=True))
    assert "fine" in next(line for line in console.export_text().splitlines() if "two" in line)
    assert as_json(report)["ok"] is False
    assert as_json({"second": report["second"]})["ok"] is True
