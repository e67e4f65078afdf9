"""The fixture `shards`, and the signals of pytest."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.data.handmade import all_tasks, write
from wemmu.config.task import Task


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of eight records for each of two tasks."""
    root = tmp_path_factory.mktemp("shards")
    write(root, all_tasks({Task.T2I: 8, Task.EDIT: 8}))
    return root


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    """A trainer takes over the signals of its process; give pytest's back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)
