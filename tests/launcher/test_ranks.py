"""A job's ranks: told who they are, stopped together, and their exit code is the job's."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.patience import eventually

# In one write, since the ranks share a pipe.
SAYS = """
import os
said = " ".join(os.environ[k] for k in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"))
os.write(1, f"{said}\\n".encode())
"""
# Saves when it is told to stop, as a trainer does.
SAVES = """
import os, signal, sys, time
told = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda n, _: told.append(n))
open(f"{sys.argv[1]}/ready{os.environ['RANK']}", "w")
while not told:
    time.sleep(0.02)
open(f"{sys.argv[1]}/told{os.environ['RANK']}", "w").write(str(told[0]))
sys.exit(75)
"""
WAITS = "import os, sys, time; {}; time.sleep(60)"


def start(count: int, code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "launcher.ranks", str(count), sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_all_ranks_are_told_the_same_place_to_meet() -> None:
    said, _ = start(3, "import os; os.write(1, (os.environ['MASTER_PORT'] + chr(10)).encode())").communicate(timeout=30)
    assert len(said.split()) == 3
    assert len(set(said.split())) == 1


def test_every_rank_is_told_who_it_is() -> None:
    process = start(3, SAYS)
    said, _ = process.communicate(timeout=30)
    assert sorted(said.splitlines()) == [f"{rank} {rank} 3 127.0.0.1" for rank in range(3)]
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_all_ranks_and_a_saved_run_says_so(tmp_path: Path, number: signal.Signals) -> None:
    process = start(2, SAVES, str(tmp_path))
    eventually(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    process.send_signal(number)
    assert process.wait(timeout=30) == 75
    assert [(tmp_path / f"told{rank}").read_text() for rank in range(2)] == [str(int(number))] * 2


def test_when_a_rank_fails_the_others_are_ended_and_its_code_is_the_jobs() -> None:
    began = time.monotonic()
    process = start(3, WAITS.format("os.environ['RANK'] == '1' and sys.exit(7)"))
    _, said = process.communicate(timeout=40)
    assert process.returncode == 7
    assert "rank 1 failed with exit code 7" in said
    assert time.monotonic() - began < 30


def test_a_killed_rank_is_a_killed_job() -> None:
    process = start(2, WAITS.format("os.environ['RANK'] == '0' and os.kill(os.getpid(), 9)"))
    process.communicate(timeout=40)
    assert process.returncode == -signal.SIGKILL


def test_no_rank_outlives_the_one_that_started_them(tmp_path: Path) -> None:
    process = start(2, SAVES, str(tmp_path))
    eventually(lambda: all((tmp_path / f"ready{rank}").exists() for rank in range(2)))
    process.kill()
    for rank in range(2):
        eventually((tmp_path / f"told{rank}").exists, lambda rank=rank: f"rank {rank} goes on", seconds=20)


# Gives signs of life until it hangs; the other goes on.
HANGS = """
import os, sys, time
sys.path.insert(0, ".")
from wemmu.heartbeat import answer_with_stacks, beat
answer_with_stacks()

def where_it_hangs():
    time.sleep(600)

for step in range(10_000):
    beat()
    time.sleep(0.1)
    if os.environ["RANK"] == "1" and step == 5:
        where_it_hangs()
"""


def test_a_rank_that_hangs_ends_the_job_and_all_say_where_they_are() -> None:
    command = [sys.executable, "-m", "launcher.ranks", "--hang-after", "5", "2", sys.executable, "-c", HANGS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 124
    assert "rank 1 has made no step for" in done.stderr
    assert "in where_it_hangs" in done.stderr
    assert done.stderr.count("Current thread") == 2, "the stacks of both ranks"


def test_ranks_of_several_nodes_are_counted_through_and_meet_where_the_job_says() -> None:
    rendezvous = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "20007", "SLURM_NODEID": "1"}
    command = [sys.executable, "-m", "launcher.ranks", "--nodes", "3", "2", sys.executable, "-c", SAYS]
    said = subprocess.run(command, env=os.environ | rendezvous, capture_output=True, text=True, check=True).stdout
    assert sorted(said.splitlines()) == ["2 0 6 10.0.0.1", "3 1 6 10.0.0.1"]
