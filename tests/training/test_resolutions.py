"""Where resolutions end, that they end there however often the run is killed, and what one number moves."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.models.world import make_model
from tests.training.layouts import differences, newest_state
from tests.training.rising import BOUNDARY, MOMENTS, STEPS, config, curriculum_of, prepare, train, write_shards
from wemmu.checkpoint.collective import CheckpointError
from wemmu.checkpoint.state import TrainState
from wemmu.config.next_resolution import Plateau
from wemmu.config.schema import Backbones, Parallel
from wemmu.jsonlines import read_lines
from wemmu.parallel.topology import ALONE
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.validation import Validation
from wemmu.training.resolutions import ResolutionSchedule, plateau

REPOSITORY = Path(__file__).parents[2]
RULE = Plateau(every=5, window=2, min_gain=0.1, patience=3)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    write_shards(root)
    return root


# --- The rule


def test_a_loss_that_falls_fast_enough_never_ends_a_resolution():
    assert plateau([0.89**i for i in range(100)], RULE) is None


def test_a_flat_loss_ends_a_resolution_as_soon_as_it_can():
    first = next(n for n in range(100) if plateau([1.0] * n, RULE))
    assert first * RULE.every == RULE.fewest == 25


def test_one_lucky_validation_is_no_gain_but_its_windows_are_counted():
    """Gains smaller than min_gain do not become the new best; added up they count."""
    slow = [1.0 * 0.97**i for i in range(40)]
    assert plateau(slow, RULE) is None
    assert plateau(slow, RULE.model_copy(update={"patience": 1})) is not None


@given(st.lists(st.floats(0.01, 10), max_size=30))
def test_the_end_is_that_of_the_best_mean_so_far(losses: list[float]):
    """Against the definition, written out: who has waited `patience` validations in vain since the last gain."""
    best, waited, ended = None, 0, False
    for i in range(1, len(losses)):
        mean = (losses[i - 1] + losses[i]) / 2
        if best is None or mean < 0.9 * best:
            best, waited = mean, 0
        else:
            waited += 1
        ended = waited >= 3
    assert (plateau(losses, RULE) is not None) == ended


def test_the_loss_does_not_depend_on_the_mode_of_the_model(backbones: Backbones, shards: Path):
    run = curriculum_of(backbones, shards).resolution_runs("stage")[0]
    model, encoder = make_model(backbones).train(), PromptEncoder(backbones.vlm)
    for dropout in (m for m in model.dit.modules() if isinstance(m, torch.nn.Dropout)):
        dropout.p = 0.5
    validation = Validation(run, model, encoder, ALONE, "cpu")
    in_training = validation()
    assert model.training
    model.eval()
    assert in_training == validation()


# --- The place among the resolutions


def step_of(backbones: Backbones, shards: Path, number: int) -> Any:
    return curriculum_of(backbones, shards).stages[0].resolution_steps[number]


def test_a_resolution_whose_predecessor_has_not_ended_is_refused(backbones: Backbones, shards: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"32 px has not ended, so 64 px cannot begin; run stage@32 first"):
        ResolutionSchedule(step_of(backbones, shards, 1), tmp_path, leads=True)


@pytest.mark.parametrize("record", ["resolutions.jsonl", "rungs.jsonl"], ids=["now", "earlier version"])
def test_a_resolution_does_not_resume_from_a_checkpoint_of_the_one_below(
    backbones: Backbones, shards: Path, tmp_path: Path, record: str
):
    (tmp_path / record).write_text('{"resolution": 32, "to_step": 4}\n')
    schedule = ResolutionSchedule(step_of(backbones, shards, 1), tmp_path, leads=True)
    schedule.go_on(4)
    with pytest.raises(CheckpointError, match=r"ended at step 4, but the newest .* step 3; .* run stage@32 again"):
        schedule.go_on(3)


def test_a_resolution_that_goes_on_before_its_end_has_not_ended(backbones: Backbones, shards: Path, tmp_path: Path):
    (tmp_path / "resolutions.jsonl").write_text('{"resolution": 32, "to_step": 4}\n{"resolution": 64, "to_step": 10}\n')
    ResolutionSchedule(step_of(backbones, shards, 0), tmp_path, leads=True).go_on(0)
    assert read_lines(tmp_path / "resolutions.jsonl") == []


def test_a_decision_whose_losses_are_gone_is_not_guessed(backbones: Backbones, shards: Path, tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n{"step": 4, "validation_loss": 1.0}\n')
    with pytest.raises(CheckpointError, match=r"has 0 validation losses of steps 0 to 4, not 2.*later than step 0"):
        ResolutionSchedule(step_of(backbones, shards, 0), tmp_path, leads=True).go_on(4)


# --- Runs


def train_all(folder: Path) -> Path:
    assert [train(folder, px) for px in (32, 64)] == [0, 0]
    return folder


@pytest.fixture(scope="module")
def undisturbed(backbones: Backbones, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_all(prepare(tmp_path_factory.mktemp("runs") / "undisturbed", curriculum_of(backbones, shards)))


def final_state(folder: Path) -> TrainState:
    newest, state = newest_state(folder)
    assert (newest.step, newest.resolution) == (STEPS, 64)
    return state


def test_the_decisions_are_written_down_with_their_reasons(undisturbed: Path):
    first, last = read_lines(undisturbed / "resolutions.jsonl")
    assert (first["resolution"], first["from_step"], first["to_step"], first["next"]) == (32, 0, BOUNDARY, 64)
    assert (first["rule"], first["samples"]) == ("plateau", 4 * BOUNDARY)
    assert "has not come 50.00% below its best" in first["reason"]
    validated = [
        line["validation_loss"] for line in read_lines(undisturbed / "metrics.jsonl") if "validation_loss" in line
    ]
    assert (first["numbers"]["best"], first["numbers"]["mean"]) == tuple(validated)
    assert (last["resolution"], last["from_step"], last["to_step"], last["next"]) == (64, BOUNDARY, STEPS, None)
    assert last["rule"] == "steps"


def test_the_stage_has_one_axis_of_steps_and_one_schedule(undisturbed: Path):
    told = [line for line in read_lines(undisturbed / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in told] == list(range(1, STEPS + 1))
    optimizer = curriculum_of(Backbones(vlm=Path(), sana=Path()), Path()).stages[0].optimizer
    assert [line["lr"] for line in told] == [optimizer.lr * optimizer.lr_share(s, STEPS) for s in range(STEPS)]


def test_a_resolution_that_has_ended_is_left_as_it_is(undisturbed: Path):
    def content() -> dict[Path, bytes]:
        files = (file for file in undisturbed.rglob("*") if file.is_file())
        # Every attempt tells where it runs.
        return {file: file.read_bytes() for file in files if file.name not in ("environment.jsonl", "trainer.lock")}

    before = content()
    assert train(undisturbed, 64) == 0
    assert content() == before


def test_by_samples_it_ends_with_the_step_that_reaches_them(backbones: Backbones, shards: Path, tmp_path: Path):
    folder = prepare(tmp_path / "run", curriculum_of(backbones, shards, {"samples": 9}))
    assert train(folder, 32) == 0
    [line] = read_lines(folder / "resolutions.jsonl")
    assert (line["rule"], line["to_step"], line["numbers"]) == ("samples", 3, {"seen": 12})
    assert not [told for told in read_lines(folder / "metrics.jsonl") if "validation_loss" in told]


@pytest.mark.slow
def test_killed_in_every_resolution_and_between_them_it_ends_with_the_same_decisions_and_weights_bit_for_bit(
    undisturbed: Path, backbones: Backbones, shards: Path, tmp_path: Path
):
    folder = prepare(tmp_path / "run", curriculum_of(backbones, shards))
    for moment, px in MOMENTS.items():
        command = [sys.executable, "-m", "tests.training.rising", str(config(folder, px)), moment]
        killed = subprocess.run(
            command, cwd=REPOSITORY, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        assert killed.returncode == -signal.SIGKILL, (moment, killed.stdout, killed.stderr)
        ended = [line["resolution"] for line in read_lines(folder / "resolutions.jsonl")]
        assert ended == ([32] if moment in ("closed", "risen", "resumed") else []), moment
    train_all(folder)

    assert differences(final_state(folder), final_state(undisturbed)) == []

    def decisions(run: Path) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in line.items() if key != "time"}
            for line in read_lines(run / "resolutions.jsonl")
        ]

    def losses(run: Path) -> list[tuple[Any, ...]]:
        return [tuple(map(line.get, ("step", "loss", "validation_loss"))) for line in read_lines(run / "metrics.jsonl")]

    assert decisions(folder) == decisions(undisturbed)
    assert losses(folder) == losses(undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Parallel(engine="zero3", ranks=2), Parallel(engine="hybrid", ranks=2, pp=2)])
def test_ranks_come_to_the_decision_that_one_process_comes_to(
    undisturbed: Path, backbones: Backbones, shards: Path, tmp_path: Path, layout: Parallel
):
    folder = prepare(tmp_path / "run", curriculum_of(backbones, shards, parallel=layout))
    for px in (32, 64):
        command = ["-m", "launcher.ranks", "2", sys.executable, "-m", "wemmu.train", str(config(folder, px))]
        ran = subprocess.run(
            [sys.executable, *command], cwd=REPOSITORY, capture_output=True, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert ran.returncode == 0, (ran.stdout, ran.stderr)

    def told(run: Path, key: str) -> list[float]:
        return [line[key] for line in read_lines(run / "metrics.jsonl") if key in line]

    for key in ("validation_loss", "loss"):
        assert told(folder, key) == pytest.approx(told(undisturbed, key), rel=1e-3)
    ours, theirs = read_lines(folder / "resolutions.jsonl"), read_lines(undisturbed / "resolutions.jsonl")
    assert [(line["rule"], line["to_step"]) for line in ours] == [(line["rule"], line["to_step"]) for line in theirs]
