"""slurm/data.sh: a Ray cluster inside a job writes what one process writes, and is gone with the job."""

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from tests.data_pipeline.test_faults import contents
from tests.data_pipeline.worlds import curriculum_of, write_in_process
from tests.patience import eventually
from tests.slurm.jobs import output, processes, record, slurm, start_again_soon, submit, wait_for, wait_for_output
from tests.slurm.runs import story
from wemmu.config import dump
from wemmu.config.shards import DataSet

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

SCRIPT = Path("slurm/data.sh")


def nothing_is_left(job: int) -> bool:
    """A worker that Ray was just starting sees a moment later that its node is gone."""
    eventually(lambda: not processes(job), lambda: processes(job), seconds=30, every=0.1)
    return not list(Path("/tmp").glob(f"wemmu-{job}-*"))


@pytest.fixture(autouse=True)
def _python_and_tmp(monkeypatch: pytest.MonkeyPatch) -> None:
    # sbatch hands them to the job.
    monkeypatch.setenv("PYTHON", sys.executable)
    monkeypatch.setenv("TMPDIR", "/tmp")


def test_two_nodes_write_the_bytes_that_one_process_writes(tmp_path: Path) -> None:
    dump(curriculum_of(tmp_path / "shards"), tmp_path / "curriculum.yaml")
    options = "--nodes=2", "--cpus-per-task=1", "--time=20"
    job = submit(SCRIPT, tmp_path, *options, arguments=[str(tmp_path / "curriculum.yaml")])
    # Ray takes half a minute to start on an idle machine of two cores, several on a busy one.
    wait_for(job, "COMPLETED", seconds=1200)
    assert "Ray runs on n[1-2], head 127.0.0.2:" in output(job)
    assert nothing_is_left(job)
    shutil.move(tmp_path / "shards", tmp_path / "by_slurm")
    write_in_process(curriculum_of(tmp_path / "shards"))
    assert contents(tmp_path / "by_slurm") == contents(tmp_path / "shards")


def test_the_ledger_tells_how_a_data_job_was_disturbed_and_it_finishes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curriculum, run = curriculum_of(tmp_path / "shards"), tmp_path / "run"
    run.mkdir()
    dump(curriculum, run / "curriculum.yaml")
    monkeypatch.setenv("RUN", str(run))
    options = "--nodes=1", "--exclusive", "--cpus-per-task=1", "--time=20"
    job = submit(SCRIPT, tmp_path, *options, arguments=[str(run / "curriculum.yaml")])
    # The writer now begins with its imports.
    wait_for_output(job, "Ray runs on", seconds=600)
    wait_for(submit("", tmp_path, "--partition=high", "--nodes=2", "--exclusive"), "COMPLETED")
    start_again_soon(job)
    eventually(lambda: output(job).count("Ray runs on") == 2, lambda: output(job), seconds=600, every=0.1)
    # As Slurm does before the time limit.
    slurm("scancel", "--batch", "--signal=USR1", str(job))
    start_again_soon(job)
    eventually(lambda: output(job).count("Ray runs on") == 3, lambda: output(job), seconds=600, every=0.1)
    [head] = [process for process, command in processes(job).items() if "gcs_server" in command.split()[0]]
    os.kill(head, signal.SIGKILL)
    start_again_soon(job)
    wait_for(job, "COMPLETED", seconds=1200)
    ends = [event.outcome for event in story(run, "data") if event.event == "ended"]
    assert ends == ["saved", "saved", "crashed", "finished"]
    reasons = [event.reason for event in story(run, "data") if event.event == "ended"]
    assert "pre-empted" in reasons[0]
    assert "near its time limit" in reasons[1]
    assert record(job)["Restarts"] == "3"
    assert nothing_is_left(job)
    assert DataSet.at(curriculum.data.shards).streams


def test_the_writers_failure_is_the_jobs_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "curriculum.yaml").write_text("name: nonsense\n")
    options = "--nodes=1", "--cpus-per-task=1", "--time=20"
    job = submit(SCRIPT, tmp_path, *options, arguments=[str(tmp_path / "curriculum.yaml")])
    wait_for(job, "FAILED", seconds=1200)
    assert "curriculum.yaml" in output(job)
    assert nothing_is_left(job)
