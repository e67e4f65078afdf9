"""Ranks that cannot be a run are refused at once, and those that wait for others can be stopped."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.parallel.ranks import on_ranks
from tests.patience import eventually
from wemmu.command_line import SAVED
from wemmu.config.schema import Parallel
from wemmu.parallel import rendezvous
from wemmu.parallel.rendezvous import RanksError, RendezvousError, connect, environment
from wemmu.parallel.topology import Topology

TWO = Parallel(engine="zero3", ranks=2)
# As srun sets them for the third task of eight, on the first of two nodes.
SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu-a[007-008]", "SLURM_PROCID": "2", "SLURM_LOCALID": "2",
}  # fmt: skip
WAITS = """
import sys
from wemmu.config.schema import Parallel
from wemmu.parallel.rendezvous import connect
from wemmu.training.signals import StopFlag
stop = StopFlag()
with stop.ends_process("it waited"):
    open(sys.argv[1], "w").close()
    connect(Parallel(engine="zero3", ranks=2))
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", *SRUN):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def port() -> Iterator[int]:
    """A port that somebody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken.getsockname()[1]


def set_all(monkeypatch: pytest.MonkeyPatch, said: Mapping[str, str]) -> None:
    for name, value in said.items():
        monkeypatch.setenv(name, value)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({}, "1 process run; start them with `torchrun --nproc-per-node 2"),
        ({"RANK": "3", "WORLD_SIZE": "2"}, "RANK is 3, but WORLD_SIZE is 2; valid ranks: 0 to 1"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK is -1"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', which is not a whole number"),
        ({"RANK": "0", "WORLD_SIZE": ""}, "parallel.ranks is 2, but 1 process run"),
        ({"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "2 ranks need RANK, MASTER_PORT in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "2 ranks need MASTER_ADDR, MASTER_PORT"),
    ],
)
def test_what_is_no_rank_of_the_run_is_told_at_once(said: dict, told: str, monkeypatch: pytest.MonkeyPatch):
    set_all(monkeypatch, said)
    with pytest.raises(RanksError, match=told):
        connect(TWO)
    assert not dist.is_initialized()


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch):
    set_all(monkeypatch, {"WORLD_SIZE": "", "RANK": " "})
    topology, _ = connect(Parallel())
    assert topology == Topology(0, 1)


def test_a_port_in_use_is_named(port: int, monkeypatch: pytest.MonkeyPatch):
    set_all(
        monkeypatch,
        {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    )
    with pytest.raises(RendezvousError, match=rf"127.0.0.1:{port} .*in use; give another MASTER_PORT"):
        connect(TWO)


def connects(rank: int, world: int) -> str:
    """What is said where the second rank alone finds its GPU."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    rendezvous._device = lambda found, world: torch.device("cuda", 0) if rank == 1 else torch.device("cpu")
    try:
        return str(connect(TWO))
    except RanksError as error:
        return str(error)


def test_a_machine_without_its_gpus_is_named_by_all_ranks():
    """Else it would choose other kernels than those with a GPU, and they would wait for each other."""
    first, second = on_ranks(2, connects)
    assert first == second
    assert first.startswith(f"1 of 2 ranks see no GPU, the first is rank 0 on {socket.gethostname()}; repair")


@pytest.fixture
def scontrol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's answer for nodes whose names no network knows: the name in the place of an address."""
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho NodeName=$4 Arch=x86_64 NodeAddr=addr-of-$4 NodeHostName=vm\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")


def test_plain_srun_says_all_that_ranks_must_know(scontrol: None):
    found = environment(SRUN)
    where = {"MASTER_ADDR": "addr-of-gpu-a007", "MASTER_PORT": found["MASTER_PORT"]}
    assert found == {"RANK": "2", "WORLD_SIZE": "8", "LOCAL_RANK": "2", **where}
    # All tasks meet at one port, those of another step at another.
    assert environment(SRUN | {"SLURM_PROCID": "5", "SLURM_LOCALID": "1"})["MASTER_PORT"] == found["MASTER_PORT"]
    assert environment(SRUN | {"SLURM_STEP_ID": "2"})["MASTER_PORT"] != found["MASTER_PORT"]
    assert environment(SRUN | {"SLURM_STEP_NUM_NODES": "1"})["MASTER_ADDR"] == "127.0.0.1"
    assert environment(SRUN | {"SLURM_STEP_NODELIST": "n1-none,n2"})["MASTER_ADDR"] == "addr-of-n1-none"
    assert environment(SRUN | {"SLURM_STEP_NODELIST": "localhost,n2"})["MASTER_ADDR"] == "localhost"
    assert environment(SRUN | {"SLURM_STEP_NODELIST": "r[01-02]n[3,5],x"})["MASTER_ADDR"] == "addr-of-r01n3"
    # Who says it, knows it: the launcher starts ranks below one task of srun for each node.
    assert environment(SRUN | {"MASTER_ADDR": "10.0.0.1"})["MASTER_ADDR"] == "10.0.0.1"
    assert environment(SRUN | {"RANK": "9", "WORLD_SIZE": "16"}) == {"RANK": "9", "WORLD_SIZE": "16"}


def test_a_first_node_without_an_address_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RanksError, match=r"the name gpu-a007 of the first node has no address; .* MASTER_ADDR"):
        environment(SRUN)


@pytest.mark.slow
def test_a_signal_ends_a_rank_that_waits_for_others(port: int, tmp_path: Path):
    """The first rank without the second, and the second that has reached something that is not the first."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        unused = free.getsockname()[1]
    known = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    cases = [("0", unused, signal.SIGTERM), ("0", unused, signal.SIGINT), ("1", port, signal.SIGUSR1)]
    waiting = []
    try:
        for number, (rank, at, how) in enumerate(cases):
            ready = tmp_path / str(number)
            own = {"RANK": rank, "MASTER_PORT": str(at + number if at == unused else at)}
            command = [sys.executable, "-c", WAITS, str(ready)]
            process = subprocess.Popen(command, env=known | own, stderr=subprocess.PIPE, text=True)
            waiting.append((process, ready, how))
        for process, ready, how in waiting:
            eventually(ready.exists, seconds=120)
            process.send_signal(how)
            _, told = process.communicate(timeout=60)
            assert process.returncode == SAVED, told
            assert f"stopped by {how.name} while it waited" in told
    finally:
        for process, *_ in waiting:
            process.kill()


ENDING = """
import atexit, os, sys
import torch.distributed as dist, typer
from wemmu.command_line import fail, program, start

class Kept:
    def __del__(self, abort=os.abort):
        abort()

def main(code: int) -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    atexit.register(print, "cleaned up")
    print("done")
    fail("sentence", code) if code else None

kept = Kept()
start(program(main))
"""


@pytest.mark.parametrize("code", [0, 78])
def test_a_rank_cleans_up_but_runs_no_destructor_when_it_ends(code):
    """What threads of gloo drop during the interpreter's shutdown would abort it, in place of its exit code."""
    ended = subprocess.run([sys.executable, "-c", ENDING, str(code)], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (code, "done\ncleaned up\n"), ended.stderr
    assert ended.stderr.count("sentence") == (code != 0)
