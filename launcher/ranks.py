"""Starts a job's ranks on this machine and waits for them: `python -m launcher.ranks COUNT COMMAND...`.

On a cluster Slurm does this. torchrun would, too, but turns every exit code into 1, and with it what a run says of
itself.
"""

import os
import signal
import socket
import subprocess
import sys
import time

from launcher.local import SAVED

# How long ranks may go on after one has failed: they wait for it in vain.
_GRACE_S = 5.0
_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def main(count: int, command: list[str]) -> int:
    """Run `command` as `count` ranks; returns the exit code of the job.

    0: all ranks ended well. 75: they were interrupted and have saved their state. Else that of the rank that failed
    first, upon which the others are killed. Signals are passed on to every rank.
    """
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(count)}
    child = [sys.executable, "-m", "launcher.child", str(os.getpid()), *command]
    ranks = [
        subprocess.Popen(child, env=os.environ | where | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]

    def forward(number: int, _: object) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    return _wait(ranks)


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    failed, since = 0, 0.0
    while True:
        codes = [rank.poll() for rank in ranks]
        bad = [(i, code) for i, code in enumerate(codes) if code not in (None, 0, SAVED)]
        if bad and not failed:
            number, failed = bad[0]
            since = time.monotonic()
            print(f"rank {number} of {len(ranks)} failed with exit code {failed}", file=sys.stderr, flush=True)
        if None not in codes:
            return failed or max(code or 0 for code in codes)
        if failed and time.monotonic() - since > _GRACE_S:
            for rank in ranks:
                rank.kill()
        time.sleep(0.05)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


if __name__ == "__main__":
    code = main(int(sys.argv[1]), sys.argv[2:])
    # Killed by a signal: die of the same, so that whoever waits can say so.
    if code < 0:
        if -code in _FORWARDED:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
