"""Launcher processes that tests may interrupt and kill."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launcher.job import Job
from tests.launcher.jobs import LAUNCHER


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a launcher process on the jobs; what still runs at the end of the test is killed."""
    started: list[subprocess.Popen[str]] = []

    def start(*jobs: Job) -> subprocess.Popen[str]:
        described = [
            {
                "name": j.name,
                "command": j.command,
                "log": str(j.log),
                "products": [*map(str, j.products)],
                "steps": j.steps,
            }
            for j in jobs
        ]
        command = [sys.executable, "-c", LAUNCHER, str(tmp_path), json.dumps(described)]
        # A process group of its own, as a shell would give it, so that a test can press Ctrl-C.
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, process_group=0)
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
