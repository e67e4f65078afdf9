"""The record of a stage in Weights & Biases, uploaded by a process beside the training or by `tools/wandb_sync.py`.

Why the training does not call `wandb`, though that has a process of its own, `wandb-core` (0.31; docs/monitoring.md):
`log` raises once that has died, and blocks for good once it is stopped, in offline mode too; `init` waits for a server
that hangs. `wandb` repeats requests by itself, and `resume="allow"` continues a run from the last step that the server
has.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from html import escape
from math import inf
from pathlib import Path
from typing import Any, NoReturn

from wemmu.command_line import SAVED
from wemmu.config import load_stage
from wemmu.config.checkpoints import sheet
from wemmu.config.files import replace_text
from wemmu.config.wandb_mode import Mode
from wemmu.jsonlines import new_lines, read_lines, stage_events
from wemmu.locks import hold

ID_FILE, LOCK_FILE = "wandb_id", "wandb.lock"
# Seconds between looks at the record, before a failed upload is tried again, and at most after the end of a training.
_POLL_S, _RETRY_S, PATIENCE_S = 2.0, 60.0, 30.0
# Slurm warns every process of a job. The uploader ignores that, to upload what the run says last.
_WARNINGS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_COLUMNS = ("time", "job", "attempt", "event", "from_step", "to_step", "outcome", "reason")


class WandbUploader:
    """Uploads the stage in `folder` while this process lives. It starts a process in mode online only."""

    def __init__(self, mode: Mode, folder: Path, patience_s: float = PATIENCE_S) -> None:
        self._folder, self._patience_s = folder, patience_s
        self._process: subprocess.Popen[bytes] | None = None
        try:
            if mode.name != "disabled":
                run_id(folder)
            if mode.name == "online":
                command = [sys.executable, "-m", __name__, str(folder), str(patience_s)]
                self._process = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            print(f"W&B cannot be reached, the run goes on without it: {error}", file=sys.stderr, flush=True)

    def finish(self) -> str | None:
        """Wait at most `patience_s` for the upload to end; returns what to print if it did not."""
        if self._process is None:
            return None
        try:
            self._process.communicate(timeout=self._patience_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
        if self._process.wait() == 0:
            return None
        return f"W&B has not got all of it; `python tools/wandb_sync.py {self._folder}` uploads the rest"


def run_id(folder: Path) -> str:
    """Return the id of the stage's W&B run, which its folder keeps: every attempt and upload continues that run."""
    file = folder / ID_FILE
    if not file.exists():
        replace_text(file, os.urandom(6).hex())
    return file.read_text(encoding="utf-8")


def upload(folder: Path, more: Callable[[], bool] | None = None) -> int:
    """Upload what W&B does not have of the stage in `folder`; returns how many lines of the record that were.

    more: returns, after some time, whether to look at the record again. Without it another upload is not waited for.

    Raises:
        LockedError: if another process uploads this stage. Both would send every line.
    """
    busy = f"{folder} is being uploaded by another process, which holds {LOCK_FILE}"
    with hold(folder / LOCK_FILE, lambda _: busy, patience_s=inf if more else 0):
        os.environ["WANDB_SILENT"] = "true"
        import wandb

        stage = load_stage(folder / "config.yaml")
        run = wandb.init(
            project=stage.logging.wandb_project,
            group=stage.name,
            name=f"{stage.name}/{stage.stage.name}",
            id=run_id(folder),
            resume="allow",
            mode="online",
            dir=folder,
            config=stage.model_dump(mode="json")
            | {"environment": (read_lines(folder / "environment.jsonl") or [{}])[-1]},
            # The record is the transaction log. Statistics would be of this process, not of the training.
            settings=wandb.Settings(
                init_timeout=60,
                console="off",
                x_skip_transaction_log=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_save_requirements=False,
            ),
        )
        run.define_metric("*", step_metric="step")
        first = _ledger(folder)
        offset = step = sent = 0
        again = True
        while again:
            again = more is not None and more()
            lines, offset = new_lines(folder / "metrics.jsonl", offset)
            for line in lines:
                step = line["step"]
                if step < run.starting_step:
                    continue
                image = sheet(folder, step)
                # `pictures` in the records of earlier versions.
                if ("images" in line or "pictures" in line) and image.is_file():
                    line["images"] = wandb.Image(str(image))
                # One row for all lines of a step, which is whole when one of a later step comes.
                run.log(line | first, step=step)
                first = {}
                sent += 1
        run.finish(exit_code=0 if step >= stage.stage.steps else SAVED)
        return sent


def _ledger(folder: Path) -> dict[str, Any]:
    """The ledger up to now, for the first row that is sent. A wandb.Table would be an artifact: one more to fail."""
    import wandb

    events = stage_events(folder)
    rows = [_COLUMNS, *([event.get(column, "") for column in _COLUMNS] for event in events)]
    cells = ("".join(f"<td>{escape(str(cell))}</td>" for cell in row) for row in rows)
    attempts = sum(event.get("event") == "started" and event["job"] == folder.name for event in events)
    html = f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"
    return {"attempt": attempts, "ledger": wandb.Html(html, inject=False)}


def main(folder: Path, patience_s: float) -> NoReturn:
    """Follow a training until the other end of stdin is closed, as it is when the training ends, however it does.

    After that this may take `patience_s` seconds, then it dies of SIGALRM. A failed upload is begun again after
    a minute and at the end: a warning to the job kills `wandb-core`, whatever signal mask it inherits.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _WARNINGS)
    ended, said = threading.Event(), False

    def wait_for_the_end() -> None:
        sys.stdin.read()
        signal.setitimer(signal.ITIMER_REAL, patience_s)
        ended.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    while True:
        last = ended.is_set()
        try:
            upload(folder, more=lambda: not ended.wait(_POLL_S))
            os._exit(0)
        except Exception as error:
            if not said:
                why = f"{type(error).__name__}: {error}"
                print(f"W&B cannot be reached, the run goes on without it: {why}", file=sys.stderr, flush=True)
            said = True
        if last:
            # Without what `wandb` does at the end of a process: it would wait for a server that is gone.
            os._exit(1)
        ended.wait(_RETRY_S)
        # Forget a `wandb-core` that has died.
        with suppress(Exception):
            sys.modules["wandb"].teardown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
