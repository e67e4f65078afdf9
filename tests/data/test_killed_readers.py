"""Readers that are killed leave nothing behind, disturb nobody, and are taken up where they were."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.data.handmade import make_curriculum
from wemmu.data.loader import Loader
from wemmu.prompts import PromptEncoder

REPOSITORY = Path(__file__).resolve().parents[2]
STEPS = 24
# Waits for a line before each step, then prints the step and its samples.
READER = """
import sys
from pathlib import Path
import torch
from tests.data.handmade import make_curriculum
from wemmu.data.loader import Loader
from wemmu.prompts import PromptEncoder

shards, processor, first = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
run = make_curriculum(shards, workers=2).stage_run("only")
loader = Loader(run, PromptEncoder(processor), 16)
for step, _ in enumerate(sys.stdin, first):
    print(step, *[i for batch in loader.micro_batches(step) for i in batch.sample_ids.tolist()], flush=True)
"""


class Reader:
    def __init__(self, shards: Path, processor: Path, first: int, scratch: Path):
        self.scratch = scratch
        scratch.mkdir()
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER, str(shards), str(processor), str(first)],
            cwd=REPOSITORY, env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(scratch)}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip

    def step(self) -> list[int]:
        """Have it read its next step: the step's number, then the ids of its samples."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return [int(word) for word in self.process.stdout.readline().split()]

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def shared(self) -> list[str]:
        """What it holds that could outlive it or be in another's way: shared memory, temporary files."""
        proc = Path("/proc", str(self.process.pid))
        files = [os.readlink(link) for link in (proc / "fd").iterdir()]
        mapped = [line.split(maxsplit=5)[5] for line in (proc / "maps").read_text().splitlines() if " /" in line]
        # The checkout, its libraries included, may itself stand in a temporary directory.
        passing, staying = ("/dev/shm", "/tmp", "/var/tmp", str(self.scratch)), (str(REPOSITORY), sys.prefix)
        return [f for f in {*files, *mapped} if f.startswith(passing) and not f.startswith(staying)]


@contextmanager
def reader(shards: Path, processor: Path, first: int, scratch: Path) -> Iterator[Reader]:
    found = Reader(shards, processor, first, scratch)
    try:
        yield found
    finally:
        if found.process.poll() is None:
            found.kill()


@pytest.mark.slow
def test_killed_readers_are_taken_up_beside_a_living_one(
    shards: Path, processor: Path, encoder: PromptEncoder, tmp_path: Path
) -> None:
    loader = Loader(make_curriculum(shards).stage_run("only"), encoder, 16)
    undisturbed = [
        [step, *(i for batch in loader.micro_batches(step) for i in batch.sample_ids.tolist())] for step in range(STEPS)
    ]
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in shards.rglob("*")}
    read, beside = [], []
    with reader(shards, processor, 0, tmp_path / "living") as living:
        beside.append(living.step())
        for number, steps in enumerate((1, 9, STEPS - 10)):
            with reader(shards, processor, len(read), tmp_path / f"victim{number}") as victim:
                for _ in range(steps):
                    read.append(victim.step())
                    beside.append(living.step())
                assert [f for f in victim.shared() if not f.startswith(str(shards))] == []
                victim.kill()
            assert list(victim.scratch.iterdir()) == []
        assert living.process.poll() is None
    assert read == undisturbed
    assert beside[:STEPS] == undisturbed
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in shards.rglob("*")} == before
