"""A Slurm that answers, and one test at a time on it: a job of one would pre-empt the jobs of another."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from launcher.cluster import Cluster
from tests.data.handmade import all_tasks, write
from tests.slurm.jobs import NAME
from tests.slurm.runs import World
from wemmu.config import dump
from wemmu.config.schema import Backbones
from wemmu.config.task import Task


@pytest.fixture(scope="session")
def cluster() -> None:
    """Skips where no controller answers; fails there if WEMMU_REQUIRE_SLURM is set."""
    try:
        subprocess.run(["scontrol", "ping"], capture_output=True, check=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        if os.environ.get("WEMMU_REQUIRE_SLURM"):
            pytest.fail(f"WEMMU_REQUIRE_SLURM is set, but no Slurm answers: {error}")
        pytest.skip("no Slurm answers; `.ci/slurm start` starts one")


@pytest.fixture(autouse=True)
def _jobs(cluster: None) -> Iterator[None]:
    with FileLock(Path(tempfile.gettempdir(), "wemmu-slurm-tests.lock")):
        yield
        subprocess.run(["scancel", "--quiet", f"--name={NAME}"], check=False, timeout=60)


@pytest.fixture(scope="module")
def world(backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("slurm")
    write(folder / "shards", all_tasks({Task.T2I: 8, Task.EDIT: 8}))
    return World(backbones, folder / "shards", folder)


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """The file of a cluster profile for the Slurm of this machine."""
    file = tmp_path / "loopback.yaml"
    dump(
        Cluster(
            name="loopback", partition="low", ranks_per_node=1, gpus=False, cpus_per_node=1, exclusive=False,
            time="20", warn_before=60, data={"nodes": 2, "cpus": 1, "time": "20"},
            evaluation={"time": "20"}, export={"time": "20"},
        ),
        file,
    )  # fmt: skip
    return file
