"""Weights & Biases as a view of the record: another process reads the record and uploads it.

The training never calls `wandb`: whatever that does, be it slow, stuck, full or dead, no step waits for it. What does
not get through is still in the record, for the next attempt or for `tools/wandb_sync.py`.
"""

import signal
import subprocess
import sys
from pathlib import Path

from wemmu.config.wandb_mode import Mode
from wemmu.training.upload import run_id

# Seconds that the end of a training waits for the rest to be uploaded.
PATIENCE_S = 30.0
# What Slurm sends to every process of a job when it warns a run. The uploader is started with these blocked, so that it
# lives on to upload what the run says last. wandb's own server dies of SIGTERM all the same, and is started again.
_WARNINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class View:
    """Uploads `folder`, a stage's, while this process lives. Only in mode online is there anything to do."""

    def __init__(self, mode: Mode, folder: Path, patience_s: float = PATIENCE_S) -> None:
        self._folder, self._patience_s = folder, patience_s
        self._uploader: subprocess.Popen[bytes] | None = None
        if mode.name != "disabled":
            run_id(folder)
        if mode.name == "online":
            try:
                self._uploader = self._start()
            except OSError as error:
                print(f"W&B cannot be reached, the run goes on without it: {error}", file=sys.stderr, flush=True)

    def _start(self) -> "subprocess.Popen[bytes]":
        arguments = [str(self._folder), str(self._patience_s), "0", "follow"]
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _WARNINGS)
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "wemmu.training.upload", *arguments],
                stdin=subprocess.PIPE,
                start_new_session=True,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def finish(self) -> str | None:
        """Let the upload end, for a while; returns what to tell people if it did not."""
        if self._uploader is None:
            return None
        assert self._uploader.stdin is not None
        self._uploader.stdin.close()
        try:
            code = self._uploader.wait(self._patience_s)
        except subprocess.TimeoutExpired:
            self._uploader.kill()
            code = self._uploader.wait()
        if code == 0:
            return None
        return f"W&B has not got all of it; `python tools/wandb_sync.py {self._folder}` uploads the rest"
