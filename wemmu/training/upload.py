"""The record of a stage, uploaded to Weights & Biases: by the process that `view` starts, or `tools/wandb_sync.py`.

W&B has whatever the record had when it was last looked at, once, whoever uploaded it and however often: the step of a
line is the step of the row, and lines up to the last step that the server has are passed over.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any, NoReturn

from wemmu.config import load_stage
from wemmu.config.schema import StageRun
from wemmu.jsonlines import new_lines, read_lines, stage_events
from wemmu.locks import EXCLUSIVE, LockedError, take

ID_FILE, LOCK_FILE = "wandb_id", "wandb.lock"
# Seconds between looks at the record; and before a failed upload is tried again, doubled each time up to the longest.
_POLL_S = 2.0
_RETRY_S, _LONGEST_RETRY_S = 60.0, 1800.0
# Of a stage that was broken off; W&B calls such a run failed until it goes on.
_UNFINISHED = 75
_COLUMNS = ("time", "job", "attempt", "event", "from_step", "to_step", "outcome", "reason")


def run_id(folder: Path) -> str:
    """The id of a stage's W&B run, made once and kept in its folder, so that every attempt and upload continues it."""
    file = folder / ID_FILE
    if not file.exists():
        file.write_text(os.urandom(6).hex(), encoding="utf-8")
    return file.read_text(encoding="utf-8")


class Upload:
    """The W&B run of one stage, open; all there is to tell of it is in `folder` and the ledger beside that."""

    def __init__(self, folder: Path) -> None:
        # Its settings come too late for what it says of the login.
        os.environ["WANDB_SILENT"] = "true"
        import wandb

        self._folder, self._wandb = folder, wandb
        self._stage: StageRun = load_stage(folder / "config.yaml")
        self._offset = 0
        self._events_sent = False
        environments = read_lines(folder / "environment.jsonl")
        self._run = wandb.init(
            project=self._stage.logging.wandb_project,
            group=self._stage.name,
            name=f"{self._stage.name}/{self._stage.stage.name}",
            id=run_id(folder),
            resume="allow",
            mode="online",
            dir=folder,
            config=self._stage.model_dump(mode="json") | {"environment": environments[-1] if environments else {}},
            settings=wandb.Settings(
                silent=True,
                init_timeout=60,
                console="off",
                # The record is what a broken upload goes on from.
                x_skip_transaction_log=True,
                # What they would tell is of this process, and not of the training.
                x_disable_stats=True,
                x_disable_meta=True,
                x_save_requirements=False,
                disable_git=True,
                disable_code=True,
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        # The first step that the server does not have.
        self._next: int = self._run.starting_step
        self.last_step = 0

    def send(self) -> int:
        """Send what is new in the record; returns how many lines that were."""
        lines, self._offset = new_lines(self._folder / "metrics.jsonl", self._offset)
        new = 0
        for line in lines:
            self.last_step = line["step"]
            if line["step"] >= self._next:
                # One row for all lines of a step, which is whole when one of a later step comes.
                self._run.log(self._shown(line) | self._events(), step=line["step"])
                new += 1
        return new

    def finish(self) -> None:
        """Wait until W&B has everything."""
        self._run.finish(exit_code=0 if self.last_step >= self._stage.stage.steps else _UNFINISHED)

    def _events(self) -> dict[str, Any]:
        """The ledger up to now, with the first line that is sent."""
        if self._events_sent:
            return {}
        self._events_sent = True
        events = stage_events(self._folder)
        attempts = sum(event.get("event") == "started" and event["job"] == self._folder.name for event in events)
        # Not a wandb.Table: that is an artifact, with a login of its own, and so one thing more that can fail.
        return {"attempt": attempts, "ledger": self._wandb.Html(_table(events), inject=False)}

    def _shown(self, line: dict[str, Any]) -> dict[str, Any]:
        """A line of the record, with the sample sheet in the place of its number of pictures."""
        if "pictures" not in line:
            return line
        file = self._folder / "samples" / f"step_{line['step']:08d}.png"
        return line | {"pictures": self._wandb.Image(str(file))}


def _table(events: list[dict[str, Any]]) -> str:
    rows = [_COLUMNS, *([str(event.get(column, "")) for column in _COLUMNS] for event in events)]
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


@contextmanager
def alone(folder: Path, wait: bool) -> Iterator[None]:
    """Keep other uploads of this stage away: two at once would send every line twice.

    Raises:
        LockedError: if there is another one and `wait` is off.
    """
    with (folder / LOCK_FILE).open("w", encoding="utf-8") as lock:
        if not take(lock.fileno(), EXCLUSIVE, folder / LOCK_FILE, wait):
            raise LockedError(f"{folder} is being uploaded by another process, which holds {LOCK_FILE}")
        yield


def follow(folder: Path, over: threading.Event, reached: Callable[[], None]) -> None:
    """Upload the record as it grows, until `over` is set; `reached` is called once W&B has answered."""
    with alone(folder, wait=True):
        upload = Upload(folder)
        reached()
        while not over.wait(_POLL_S):
            upload.send()
        upload.send()
        upload.finish()


def main(folder: Path, patience_s: float, failures: int, over: bool) -> NoReturn:
    """Follow a training until the other end of stdin is closed, as it is when the training ends, however it does.

    After that it may take `patience_s` seconds, then it dies of SIGALRM. A failed upload is tried again, later and
    later, by this process made anew, so that nothing of the failure is left; `failures` tells how often it was, and
    only of the first is told. After the end (`over`) it is tried once more.
    """
    ended, deadline, pause = threading.Event(), float("inf"), min(_RETRY_S * 2**failures, _LONGEST_RETRY_S)

    def wait_for_the_end() -> None:
        nonlocal deadline
        sys.stdin.read()
        signal.setitimer(signal.ITIMER_REAL, patience_s)
        deadline = time.monotonic() + patience_s
        ended.set()

    def reached() -> None:
        # What breaks after this can be mended at once: most likely a warning to the job killed wandb's own server.
        nonlocal pause
        pause = _POLL_S

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    # Before `wandb` writes into it where its server is.
    environment = dict(os.environ)
    try:
        follow(folder, ended, reached)
    except Exception as error:
        if failures == 0:
            why = f"{type(error).__name__}: {error}"
            print(f"W&B cannot be reached, the run goes on without it: {why}", file=sys.stderr, flush=True)
        now_over = ended.wait(pause)
        left = min(patience_s, deadline - time.monotonic())
        # Without what `wandb` does at the end of a process: it would wait for a server that is gone.
        if over or left <= 0:
            os._exit(1)
        again = [str(folder), str(left), str(failures + 1), "over" if now_over else "follow"]
        os.execve(sys.executable, [sys.executable, "-m", "wemmu.training.upload", *again], environment)
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "over")
