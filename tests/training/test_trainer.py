"""A run that is killed, stopped and taken up again is the run that was never disturbed, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.checkpoints import load_weights
from tests.training.layouts import differences, newest_state
from tests.training.runs import make_run
from wemmu import train
from wemmu.checkpoint import retention, store
from wemmu.checkpoint.manifest import read_manifest
from wemmu.checkpoint.saver import Saver
from wemmu.checkpoint.state import TrainState
from wemmu.command_line import FINAL, SAVED
from wemmu.config import StageRun, dump, load_stage
from wemmu.config.schema import Backbones
from wemmu.jsonlines import read_lines
from wemmu.parallel.adamw import AdamW
from wemmu.recipes.wemmu.loss import FlowMatchingLoss, Losses
from wemmu.training import resume
from wemmu.training.hold import held
from wemmu.training.trainer import Trainer

REPOSITORY = Path(__file__).parents[2]
IMAGE, CONFIG = "image.png", "config.yaml"
PATIENCE_S = 300


def prepare(folder: Path, backbones: Backbones, shards: Path, **logging: object) -> Path:
    """A run folder whose sample grids edit `folder/image.png`."""
    folder.mkdir()
    run = make_run(
        backbones,
        shards,
        sampling={"steps": 1, "prompts": [{"text": "make it blue", "images": [folder / IMAGE]}]},
    )
    changes = {"stage.optimizer.ema_decay": 0.9} | {f"logging.{name}": value for name, value in logging.items()}
    dump(run.changed(changes), folder / CONFIG)
    return folder


def draw_image(file: Path) -> None:
    """Put an image there in one step, whatever was there before."""
    aside = file.with_suffix(".new.png")
    Image.new("RGB", (32, 32), "red").save(aside)
    os.replace(aside, file)


def steps_recorded(folder: Path) -> list[int]:
    return [line["step"] for line in read_lines(folder / "metrics.jsonl") if "loss" in line]


class Ending(NamedTuple):
    exit_code: int
    checkpoints: list[str]
    output: str


def start_and_interrupt(folder: Path, at_step: int, number: signal.Signals) -> Ending:
    """Run `python -m wemmu.train` and send it a signal while it draws the samples of `at_step`.

    It waits there by itself: the image it is to edit is a pipe without a writer. What it began to save before is
    saved.
    """
    (folder / IMAGE).unlink(missing_ok=True)
    os.mkfifo(folder / IMAGE)
    command = [sys.executable, "-m", "wemmu.train", str(folder / CONFIG)]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    watchdog = threading.Timer(PATIENCE_S, process.kill)
    watchdog.start()
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if f"step {at_step}/" in line:
                break
        saved = folder / "checkpoints" / store.directory_name((at_step - 1) // 2 * 2)
        while process.poll() is None and not saved.exists():
            time.sleep(0.05)
        process.send_signal(number)
        # A read of a pipe goes on after a signal. Now it finds an image, and the second signal makes it look again.
        draw_image(folder / IMAGE)
        process.send_signal(signal.SIGUSR1)
        said += process.stdout.readlines()
        process.wait()
    finally:
        process.kill()
        watchdog.cancel()
    names = sorted(d.name for d in (folder / "checkpoints").iterdir())
    return Ending(process.returncode, names, "".join(said))


def run_to_the_end(folder: Path) -> int:
    draw_image(folder / IMAGE)
    return Trainer(load_stage(folder / CONFIG), folder).train()


@pytest.fixture(scope="module")
def undisturbed(backbones: Backbones, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from start to end, for which W&B is broken: what is imported as `wandb` raises."""
    folder = prepare(tmp_path_factory.mktemp("runs") / "undisturbed", backbones, shards, wandb="online")
    (folder / "wandb.py").write_text("raise RuntimeError('wandb is broken')")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(REPOSITORY)]))
        assert run_to_the_end(folder) == 0
    return folder


@pytest.fixture(scope="module")
def disturbed(
    backbones: Backbones, shards: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Ending]]:
    """The same run, killed at step 3, stopped by SIGTERM at step 3 and by SIGINT at step 6, then run to its end."""
    folder = prepare(tmp_path_factory.mktemp("runs") / "disturbed", backbones, shards)
    endings = [
        start_and_interrupt(folder, 3, signal.SIGKILL),
        start_and_interrupt(folder, 3, signal.SIGTERM),
        start_and_interrupt(folder, 6, signal.SIGINT),
    ]
    assert run_to_the_end(folder) == 0
    return folder, endings


@pytest.fixture
def folder(backbones: Backbones, shards: Path, tmp_path: Path) -> Path:
    """A run that has not begun and draws no samples."""
    return prepare(tmp_path / "run", backbones, shards, samples_every=100)


def final_state(folder: Path) -> TrainState:
    newest, state = newest_state(folder)
    assert newest.step == 8
    return state


def test_a_run_whose_wandb_is_broken_ends_well(undisturbed: Path):
    assert steps_recorded(undisturbed) == list(range(1, 9))


@pytest.mark.slow
def test_the_run_folder_says_which_kernels_ran(undisturbed: Path):
    found = json.loads((undisturbed / "kernels.json").read_text())
    assert (found["adamw"], found["norms"], found["compiled"]) == ("torch", "plain", False)
    assert found["attention"]
    assert found["masked_attention"]


def test_killing_leaves_only_what_was_saved_before(disturbed: tuple[Path, list[Ending]]):
    killed = disturbed[1][0]
    assert (killed.exit_code, killed.checkpoints) == (-signal.SIGKILL, ["step_00000002"]), killed.output


@pytest.mark.slow
@pytest.mark.parametrize(("ending", "step"), [(1, 3), (2, 6)], ids=["SIGTERM", "SIGINT"])
def test_a_stop_saves_the_step_it_is_in_and_exits_with_75(disturbed: tuple[Path, list[Ending]], ending: int, step: int):
    stopped = disturbed[1][ending]
    assert stopped.exit_code == SAVED == 75, stopped.output
    assert stopped.checkpoints[-1] == store.directory_name(step)
    assert f"at step {step}, all of it saved" in stopped.output


@pytest.mark.slow
def test_a_disturbed_run_ends_with_the_same_weights_and_moments_bit_for_bit(undisturbed: Path, disturbed):
    straight, interrupted = final_state(undisturbed), final_state(disturbed[0])
    assert differences(interrupted, straight) == []


@pytest.mark.slow
def test_a_disturbed_run_records_every_step_once_with_the_same_losses(undisturbed: Path, disturbed):
    def losses(folder: Path) -> list[tuple[int, float, float]]:
        lines = [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
        return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]

    assert [step for step, *_ in losses(disturbed[0])] == list(range(1, 9))
    assert losses(disturbed[0]) == losses(undisturbed)


def test_a_run_that_goes_on_without_its_average_says_so(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    trainer = Trainer(load_stage(folder / CONFIG).changed({"stage.optimizer.ema_decay": None}), folder)
    assert "its moving average of the weights (EMA) ends here" in capsys.readouterr().out
    assert trainer.parts.engine.state().ema == {}


def test_training_changes_the_weights(undisturbed: Path):
    newest, older = sorted((undisturbed / "checkpoints").iterdir(), reverse=True)
    after, before = (load_weights(d)[0] for d in (newest, older))
    assert [name for name in after if torch.equal(after[name], before[name])] == []


def test_a_finished_run_is_left_as_it_is(undisturbed: Path):
    before = {f: f.stat().st_mtime_ns for f in (undisturbed / "checkpoints").rglob("*")}
    assert run_to_the_end(undisturbed) == 0
    assert {f: f.stat().st_mtime_ns for f in (undisturbed / "checkpoints").rglob("*")} == before
    assert steps_recorded(undisturbed) == list(range(1, 9))


def test_a_loss_that_is_not_finite_ends_the_run_with_its_last_checkpoint_whole(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    real = FlowMatchingLoss.__call__

    def diverging(self: FlowMatchingLoss, batch, step: int) -> Losses:
        losses = real(self, batch, step)
        return losses._replace(values=losses.values * (float("nan") if step == 3 else 1))

    monkeypatch.setattr(FlowMatchingLoss, "__call__", diverging)
    told = failed(folder, capfd)
    assert "the gradient is not finite at step 3" in told
    assert "step_00000002" in told
    assert retention.latest(folder / "checkpoints") == folder / "checkpoints" / "step_00000002"
    assert steps_recorded(folder) == [1, 2, 3]


def test_a_step_is_saved_once_even_when_the_run_is_stopped_there(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Saving again would for a moment leave the run without its newest checkpoint."""
    run: StageRun = load_stage(folder / CONFIG)
    saved: list[int] = []
    real = Saver.save

    def save_and_stop(self: Saver, state: TrainState, *rest) -> None:
        saved.append(state.steps)
        os.kill(os.getpid(), signal.SIGTERM)
        real(self, state, *rest)

    monkeypatch.setattr(Saver, "save", save_and_stop)
    assert Trainer(run, folder).train() == SAVED
    assert saved == [2]


def test_a_stage_whose_output_nobody_reads_any_more_saves_and_ends(folder: Path):
    command = [sys.executable, "-m", "wemmu.train", str(folder / CONFIG)]
    with subprocess.Popen(
        command, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        next(line for line in process.stdout if "step 1/" in line)
        process.stdout.close()
        assert process.wait(PATIENCE_S) == SAVED, process.stderr.read()
    assert (retention.latest(folder / "checkpoints") or folder).name in {store.directory_name(s) for s in range(1, 6)}


def failed(folder: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Train a stage that ends with the exit code of what would fail again; returns what is told of it."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        train.main(folder / CONFIG)
    assert caught.value.code == FINAL
    return capfd.readouterr().err


def test_weights_that_an_update_made_infinite_are_never_saved(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """The loss and the gradient of that step are still finite."""
    real = AdamW.step

    def overflowing(self: AdamW, lr_share: float, norm: Tensor) -> None:
        real(self, lr_share, norm)
        if self.state().steps == 4:
            next(iter(self.weights.values())).data.view(-1)[0] = float("inf")

    monkeypatch.setattr(AdamW, "step", overflowing)
    told = failed(folder, capfd)
    assert "step_00000004 was not written: not finite are model." in told
    assert f"The newest finite checkpoint is {folder / 'checkpoints' / 'step_00000002'}" in told
    assert [d.name for d in (folder / "checkpoints").iterdir()] == ["step_00000002"]


def test_a_second_trainer_of_a_folder_is_refused_and_told_of_the_first(folder: Path, capfd: pytest.CaptureFixture):
    with held(folder):
        told = failed(folder, capfd)
    assert "is being trained in by another process" in told
    assert f"pid {os.getpid()} on " in told
    assert not (folder / "checkpoints").exists()


HOLDS = """
import os, sys, time
from pathlib import Path
from wemmu.training.hold import held
with held(Path(sys.argv[1])):
    # As a process of the loader, which shares the lock and outlives the rank for a while.
    if os.fork() == 0:
        time.sleep(3)
        os._exit(0)
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_trainer_that_was_killed_holds_its_folder_no_longer(tmp_path: Path):
    command = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        process.kill()
    with held(tmp_path):
        pass


@pytest.mark.parametrize(
    ("file", "place", "told"),
    [
        ("environment.jsonl", "/dev/full", "No space left on device"),
        ("trainer.lock", "/sys/wemmu", "Permission denied"),
    ],
)
def test_a_folder_that_cannot_be_written_is_a_sentence_and_no_traceback(
    file: str, place: str, told: str, folder: Path, capfd: pytest.CaptureFixture
):
    (folder / file).symlink_to(place)
    said = failed(folder, capfd)
    assert f"stage: the run folder {folder} cannot be written: " in said
    assert told in said


def test_stopped_before_its_first_step_a_run_does_not_claim_to_have_saved(folder: Path, capfd: pytest.CaptureFixture):
    trainer = Trainer(load_stage(folder / CONFIG), folder)
    trainer.stop.reason = "SIGTERM"
    assert trainer.train() == SAVED
    assert "stopped by SIGTERM before the first step: nothing to save" in capfd.readouterr().out
    assert list((folder / "checkpoints").iterdir()) == []


def test_a_config_that_was_edited_between_attempts_is_told_recorded_and_counted(
    undisturbed: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    """The learning rate may change; the global batch orders the samples, so it must be asked for, and then counts."""
    folder = shutil.copytree(undisturbed, tmp_path / "stage")
    (tmp_path / "ledger.jsonl").write_text("")
    shutil.rmtree(folder / "checkpoints" / store.directory_name(8))
    run = load_stage(folder / CONFIG)
    run = run.changed({"stage.optimizer.lr": 0.002, "stage.global_batch": 2})
    dump(run, folder / CONFIG)
    assert "other samples would follow: global_batch: 4 -> 2" in failed(folder, capfd)
    dump(run.changed({"data.resume_reordered": True}), folder / CONFIG)
    assert run_to_the_end(folder) == 0
    assert "changed since that checkpoint: optimizer.lr: 0.001 -> 0.002" in capfd.readouterr().out
    (event,) = read_lines(tmp_path / "ledger.jsonl")
    assert (event["event"], event["from_step"]) == ("changed", 6)
    assert "global_batch: 4 -> 2; optimizer.lr: 0.001 -> 0.002" in event["reason"]
    lines = read_lines(folder / "metrics.jsonl")
    assert [line["samples"] for line in lines if "loss" in line] == [4, 8, 12, 16, 20, 24, 26, 28]
    assert resume.samples_seen(read_manifest(folder / "checkpoints" / store.directory_name(8))) == 28
