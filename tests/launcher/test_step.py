"""What runs on the nodes of a Slurm job."""

import json
import socket
import sys
from pathlib import Path

import pytest

from launcher import slurm, step
from launcher.cluster import Cluster, Container
from launcher.job import Job

TRAINING = Job("stage1", ("python", "-m", "wemmu.train", "x"), Path("log.txt"), steps=9, ranks=8, hang_after=60.0)


def test_one_task_on_each_node_starts_its_ranks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "12")
    here = Path.cwd()
    image = Container(image="docker://wemmu", mounts=("/shared:/shared", "/data:/data:ro"))
    called = step.command(TRAINING, Cluster(name="site", container=image))
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=12"} < set(called)
    assert {
        "--container-image=docker://wemmu",
        f"--container-mounts=/shared:/shared,/data:/data:ro,{here}:{here}",
    } < set(called)
    assert f"--container-workdir={here}" in called
    begin = called.index("launcher.ranks")
    assert called[begin + 1 :] == ["--nodes", "2", "--hang-after", "60.0", "4", *TRAINING.command]


def test_what_trains_nothing_runs_once_and_meets_nobody(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "2")
    job = Job("export", ("python", "convert"), Path("log.txt"))
    assert step.command(job, None)[-2:] == ["python", "convert"]
    assert "--nodes=1" in step.command(job, None)
    assert step.rendezvous(job, 7, "n[1-2]") == {}


def test_what_trains_nothing_runs_in_the_container_too_by_its_python():
    job = Job("export", (sys.executable, "convert"), Path("log.txt"))
    here = Path.cwd()
    called = step.command(
        job, Cluster(name="site", container=Container(image="x", mounts=(f"{here.parent}:{here.parent}",)))
    )
    assert {
        "--container-image=x",
        f"--container-workdir={here}",
        f"--container-mounts={here.parent}:{here.parent}",
    } < set(called)
    assert called[-2:] == ["python", "convert"]


def test_ranks_that_nodes_cannot_share_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_JOB_NUM_NODES", "3")
    with pytest.raises(
        ValueError, match=r"ranks is 8, which cannot be divided among the 3 nodes .*; valid .* 1, 2, 4, 8 "
    ):
        step.check_layout(TRAINING)


def test_a_port_in_use_is_passed_over(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(slurm, "address", lambda node: f"address of {node}")
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(step, "_PORTS_FROM", port - 321)
        found = step.rendezvous(TRAINING, 10_321, "n[1-2]")
    assert found == {"MASTER_ADDR": "address of n1", "MASTER_PORT": str(port + 1009)}


def test_the_environment_is_recorded_without_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("NCCL_DEBUG", "OMP_NUM_THREADS", "WANDB_API_KEY", "HF_TOKEN"):
        monkeypatch.setenv(name, "1")
    step.record_environment(Job("stage1", (), tmp_path / "log.txt"))
    said = json.loads((tmp_path / "log.environment.json").read_text())
    assert {"NCCL_DEBUG", "OMP_NUM_THREADS"} <= set(said)
    assert not {"WANDB_API_KEY", "HF_TOKEN"} & set(said)
