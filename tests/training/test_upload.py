"""What W&B sees of a stage, through the real `wandb` and a server of our own; and that training sees nothing of W&B."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.patience import eventually
from tests.training.runs import STAGE_RUN
from tests.training.wandb_server import KEY, Run, Server
from wemmu.config import dump
from wemmu.config.wandb_mode import Mode
from wemmu.locks import LockedError, hold
from wemmu.training.upload import ID_FILE, LOCK_FILE, WandbUploader, run_id, upload

REPOSITORY = Path(__file__).parents[2]
ONLINE = Mode("online", "the test says so")
PATIENCE_S = 90.0


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
        yield server


@pytest.fixture
def stage(tmp_path: Path) -> Path:
    """The folder of a stage of 8 steps that has not begun."""
    folder = tmp_path / "run" / "stage"
    (folder / "samples").mkdir(parents=True)
    dump(STAGE_RUN, folder / "config.yaml")
    (folder / "environment.jsonl").write_text('{"commit": "abc"}\n')
    return folder


def record(folder: Path, steps: range, rate: float = 1.0) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps({"step": step, "loss": 1 / step, "samples_per_s": rate}) + "\n")


def draw(folder: Path, step: int) -> None:
    Image.new("RGB", (8, 8), "red").save(folder / "samples" / f"step_{step:08d}.png")
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": step, "images": 1, "blank_images": 0}) + "\n")


def note(folder: Path, attempt: int, event: str, **more: object) -> None:
    with (folder.parent / "ledger.jsonl").open("a") as file:
        file.write(json.dumps({"job": folder.name, "attempt": attempt, "event": event, **more}) + "\n")


def sync(folder: Path, *options: str) -> str:
    """What `tools/wandb_sync.py` says."""
    command = [sys.executable, str(REPOSITORY / "tools" / "wandb_sync.py"), str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert KEY not in done.stdout + done.stderr
    return done.stdout


def await_steps(run: Run, *steps: int) -> None:
    eventually(lambda: [row["step"] for row in run.history] == list(steps), lambda: run.history, seconds=PATIENCE_S)


@pytest.mark.slow
def test_attempts_and_uploads_make_one_run_in_which_every_step_is_once(server: Server, stage: Path):
    """Offline first; then killed after step 6 and gone on from step 4, as a requeued job is; then uploaded twice."""
    note(stage, 1, "started")
    record(stage, range(1, 4))
    draw(stage, 3)
    assert "4 lines for the W&B run" in sync(stage.parent, "--dry-run")
    assert server.writes == 0
    assert "4 of 4 lines" in sync(stage.parent)
    (run,) = server.runs.values()
    assert (run.name, run.group) == ("tiny/stage", "tiny")
    assert run.config["environment"]["value"] == {"commit": "abc"}
    assert run.config["seed"]["value"] == 0
    assert run.exit_code == 75
    assert [metric for metric in run.config["_wandb"]["value"]["m"] if metric.get("2") == "*"], "no step axis"

    record(stage, range(4, 7))
    assert "3 of 7 lines" in sync(stage)
    note(stage, 1, "ended", reason="killed & lost")
    note(stage, 2, "started", from_step=4)
    lines = (stage / "metrics.jsonl").read_text().splitlines()
    (stage / "metrics.jsonl").write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= 4))
    record(stage, range(5, 9), rate=2.0)
    draw(stage, 8)
    assert "3 of 10 lines" in sync(stage)
    assert "0 of 10 lines" in sync(stage)
    assert list(server.runs) == [(stage / ID_FILE).read_text()]
    assert [(row["_step"], row["step"]) for row in run.history] == [(step, step) for step in range(1, 9)]
    assert [row["samples_per_s"] for row in run.history] == [1.0] * 6 + [2.0] * 2
    assert [row["step"] for row in run.history if "images" in row] == [3, 8]
    assert run.exit_code == 0
    told = [file.decode() for name, file in run.files.items() if name.startswith("media/html/ledger")]
    assert any("killed &amp; lost" in text for text in told)
    assert run.history[6]["attempt"] == 2
    assert sum(name.startswith("media/images/images") for name in run.files) == 2


def descendants(pid: int) -> list[int]:
    children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in _children(task)]
    return children + [further for child in children for further in descendants(child)]


def _children(task: Path) -> list[str]:
    return (task / "children").read_text().split()


@pytest.mark.slow
def test_the_upload_outlives_the_warnings_of_a_job_and_sends_what_the_run_says_last(server: Server, stage: Path):
    uploader = WandbUploader(ONLINE, stage, PATIENCE_S)
    record(stage, range(1, 3))
    eventually(lambda: server.runs and next(iter(server.runs.values())).history, seconds=PATIENCE_S)
    (run,) = server.runs.values()
    await_steps(run, 1)  # the row of step 2 is whole when one of step 3 comes
    process = uploader._process
    assert process is not None
    processes = [process.pid, *descendants(process.pid)]
    names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in processes]
    assert any("wandb-core" in name for name in names), names
    for pid in processes:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
    record(stage, range(3, 5))
    assert uploader.finish() is None
    await_steps(run, 1, 2, 3, 4)


@pytest.mark.slow
def test_a_server_that_does_not_answer_is_waited_for_at_the_end_alone_and_not_long(server: Server, stage: Path):
    server.answers.clear()
    began = time.monotonic()
    uploader = WandbUploader(ONLINE, stage, patience_s=3.0)
    assert time.monotonic() - began < 2
    record(stage, range(1, 9))
    time.sleep(3)
    began = time.monotonic()
    said = uploader.finish()
    assert time.monotonic() - began < 10
    assert said is not None
    assert f"tools/wandb_sync.py {stage}" in said
    server.answers.set()
    assert "8 of 8 lines" in sync(stage)


FAKES = {
    "raises": "raise RuntimeError('wandb is broken')",
    "hangs": "import time; time.sleep(10**6)",
    "dies": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("fake", FAKES)
def test_a_wandb_that(fake: str, stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    """raises, hangs or dies is told of in one line and leaves the rest of the run alone."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(FAKES[fake])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "fake"), str(REPOSITORY)]))
    began = time.monotonic()
    uploader = WandbUploader(ONLINE, stage, patience_s=2.0)
    assert time.monotonic() - began < 2, "the start waits for wandb"
    process = uploader._process
    assert process is not None
    if fake == "dies":
        process.wait(PATIENCE_S)
    else:
        time.sleep(4)
    assert "uploads the rest" in str(uploader.finish())
    assert process.poll() is not None
    told = capfd.readouterr().err.splitlines()
    assert len(told) == (fake == "raises"), told
    assert fake != "raises" or "wandb is broken" in told[0]


def test_the_upload_ends_with_the_training_however_that_ends(stage: Path, tmp_path: Path):
    (tmp_path / "wandb.py").write_text("import time; time.sleep(10**6)")
    code = (
        "import os, sys; from pathlib import Path; from wemmu.training.upload import WandbUploader as Uploader; "
        "from wemmu.config.wandb_mode import Mode; started = Uploader(Mode('online', ''), Path(sys.argv[1]), 1.0); "
        "print(started._process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPOSITORY)])}
    done = subprocess.run([sys.executable, "-c", code, str(stage)], env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL
    uploader = Path(f"/proc/{int(done.stdout)}")
    eventually(lambda: not uploader.exists() or "\nState:\tZ" in (uploader / "status").read_text(), seconds=PATIENCE_S)


def test_two_uploads_of_a_stage_at_once_are_refused(stage: Path):
    with hold(stage / LOCK_FILE, str), pytest.raises(LockedError, match="is being uploaded by another process"):
        upload(stage)


def test_offline_starts_nothing_and_still_fixes_the_id(stage: Path):
    uploader = WandbUploader(Mode("offline", ""), stage)
    assert uploader._process is None
    assert uploader.finish() is None
    assert (stage / ID_FILE).read_text() == run_id(stage)


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_a_disk_that_fails_is_told_of_and_leaves_training_alone(mode: str, stage: Path, capfd):
    """As one that is full: the id of the run can neither be read nor written."""
    (stage / ID_FILE).mkdir()
    assert WandbUploader(Mode(mode, ""), stage).finish() is None
    assert "the run goes on without it" in capfd.readouterr().err


def test_disabled_leaves_no_trace(stage: Path):
    before = sorted(stage.rglob("*"))
    assert WandbUploader(Mode("disabled", ""), stage).finish() is None
    assert sorted(stage.rglob("*")) == before
