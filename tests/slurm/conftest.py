"""A Slurm that answers, and one test at a time on it: a job of one would pre-empt the jobs of another."""

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.slurm.jobs import NAME


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
