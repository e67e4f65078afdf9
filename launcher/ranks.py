"""Starts a job's ranks on one node and watches them: `python -m launcher.ranks [options] COUNT COMMAND...`.

On a cluster `srun` starts this once on each node. Not torchrun: it turns every exit code into 1 and does not notice a
rank that hangs.
"""

import argparse
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from wemmu import batch_job
from wemmu.command_line import HUNG, SAVED

# Seconds until the other ranks are killed after one has failed; they wait for it in vain.
_GRACE_S = 5.0
# Seconds that each rank of a hung job may take to write its stack.
_STACKS_S = 1.0
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main(arguments: Sequence[str]) -> int:
    """Run a command as the ranks of this node; returns the exit code of the job.

    0: all ranks succeeded. 75: they were interrupted and saved their state. 124: a rank hung; the log holds the stacks
    of all ranks, which were killed. Otherwise the code of the rank that failed first; the others are killed. Signals
    are forwarded to every rank, but not to its children.
    """
    said = _parse(arguments)
    with tempfile.TemporaryDirectory(prefix="wemmu-ranks-") as scratch:
        beats = [Path(scratch, str(rank)) for rank in range(said.count)]
        where = _rendezvous(said.nodes)
        ranks = [_start(said, rank, beat, where) for rank, beat in enumerate(beats)]

        def forward(number: int, _: object) -> None:
            for rank in ranks:
                if rank.poll() is None:
                    rank.send_signal(number)

        for number in _FORWARDED:
            signal.signal(number, forward)
        first = said.node * said.count
        return _wait(ranks, beats, first, said.hang_after)


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m launcher.ranks")
    parser.add_argument("count", type=int, help="ranks on each node")
    parser.add_argument("--nodes", type=int, default=1, help="of the job; more than one need MASTER_ADDR, MASTER_PORT")
    parser.add_argument("--node", type=int, default=batch_job.node_number(), help="number of this one")
    parser.add_argument("--hang-after", type=float, default=math.inf, help="seconds until a silent rank counts as hung")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    said = parser.parse_args(arguments)
    if said.nodes == 1:
        said.node = 0
    return said


def _start(said: argparse.Namespace, local: int, beat: Path, where: dict[str, str]) -> "subprocess.Popen[bytes]":
    rank = said.node * said.count + local
    own = where | {
        "WORLD_SIZE": str(said.nodes * said.count),
        "RANK": str(rank),
        "LOCAL_RANK": str(local),
        "WEMMU_HEARTBEAT": str(beat),
    }
    beat.touch()
    child = [sys.executable, "-m", "launcher.child", str(os.getpid()), *said.command]
    # The ranks inherit open files, so the run folder's lock lives as long as they do.
    return subprocess.Popen(child, env=os.environ | own, close_fds=False)


def _rendezvous(nodes: int) -> dict[str, str]:
    """Return where the ranks connect: a free port on one node; on several nodes, what the job sets."""
    if nodes > 1:
        return {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT")}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}


def _silence(beat: Path) -> float:
    """Return the seconds since a rank's last sign of life: it touches its file after every step."""
    return time.time() - beat.stat().st_mtime


def _wait(ranks: Sequence["subprocess.Popen[bytes]"], beats: Sequence[Path], first: int, hang_after: float) -> int:
    failed, since = 0, 0.0
    while True:
        codes = [rank.poll() for rank in ranks]
        bad = [(i, code) for i, code in enumerate(codes) if code not in (None, 0, SAVED)]
        if bad and not failed:
            number, failed = bad[0]
            since = time.monotonic()
            _say(f"rank {first + number} failed with exit code {failed}")
        if None not in codes:
            return failed or max(code or 0 for code in codes)
        if failed and time.monotonic() - since > _GRACE_S:
            _kill(ranks)
        elif not failed and (
            hung := [(i, s) for i, c in enumerate(codes) if c is None and (s := _silence(beats[i])) > hang_after]
        ):
            number, silence = hung[0]
            _say(f"rank {first + number} has made no step for {silence:.0f} s; stacks of the ranks of this node:")
            _show_stacks(ranks, first)
            _kill(ranks)
            failed = HUNG
        time.sleep(0.05)


def _show_stacks(ranks: Sequence["subprocess.Popen[bytes]"], first: int) -> None:
    """Write the ranks' stacks one after the other: they share one log."""
    for number, rank in enumerate(ranks, start=first):
        if rank.poll() is None:
            _say(f"--- rank {number}")
            rank.send_signal(signal.SIGUSR2)
            time.sleep(_STACKS_S)


def _kill(ranks: Sequence["subprocess.Popen[bytes]"]) -> None:
    for rank in ranks:
        rank.kill()


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # Die of the same signal, so that the parent can report it.
    if code < 0:
        if -code in _FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
