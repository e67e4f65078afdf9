"""The copy rate of held-out edits: what it measures, that a model that copies is seen, and when the trainer warns."""

import json
from pathlib import Path

import pytest
import torch

from tests.data.handmade import shapes, stream, write
from wemmu.config import StageRun, load_curriculum
from wemmu.config.schema import Data
from wemmu.config.task import Task
from wemmu.jsonlines import read_lines
from wemmu.objectives.copying import COPIED, copy_position
from wemmu.parallel.topology import ALONE
from wemmu.training.build import load_trained
from wemmu.training.copying import copies, last_measured
from wemmu.training.trainer import Trainer

ROOT = Path(__file__).parents[2]


def test_the_position_is_0_at_the_target_and_1_at_the_input_and_blind_to_what_lies_off_the_way():
    target, source, other = torch.randn(3, 64, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    for share in (0.0, 0.5, 1.0):
        estimate = target + share * (source - target)
        assert torch.allclose(copy_position(estimate, target, source[:, None]), torch.full((64,), share), atol=1e-5)
    # Neither of both, as from a model that knows nothing: half-way on average, and no copy.
    for blind in (torch.zeros_like(target), other):
        position = copy_position(blind, target, source[:, None])
        assert position.mean().item() == pytest.approx(0.5, abs=0.05)
        assert (position > COPIED).float().mean() < 0.1
    # Of two inputs, the one that came out.
    assert copy_position(source, target, torch.stack([other, source], 1)).allclose(torch.ones(64))
    assert copy_position(source, target, target[:, None]).isnan().all()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> StageRun:
    """The miniature's stage of edits, on edits of scenes that none of its weights has seen."""
    root = tmp_path_factory.mktemp("shards")
    settings = stream(Task.EDIT, 64, 64).model_copy(update={"resolution": 64})
    write(root, {settings: shapes(Task.EDIT, 96, (64, 64))})
    run = load_curriculum(ROOT / "configs/shapes/curriculum.yaml").stage_run("stage3")
    return run.changed({"data": Data(shards=root, validation=24), "stage.mixture": {Task.EDIT: 1.0}})


def rate(run: StageRun, weights: str) -> dict[str, float]:
    measure = load_trained(run, ROOT / "assets/shapes" / weights).copying(ALONE, "cpu")
    assert measure is not None
    found = measure()
    assert found == measure(), "the same records, noise and times"
    return dict(found)


def test_a_model_that_only_reconstructs_is_seen_to_copy_and_one_that_edits_is_not(run: StageRun):
    before, after = rate(run, "stage2"), rate(run, "stage4")
    assert before["copy_rate/edit"] >= 0.6
    assert after["copy_rate/edit"] <= 0.2
    assert before["copy_position/edit"] > after["copy_position/edit"] + 0.4


def test_the_warning_needs_a_high_rate_that_does_not_fall(tmp_path: Path):
    def warned(before: float, now: float) -> bool:
        return bool(copies({"step": 1, "copy_rate/edit": before}, {"copy_rate/edit": now, "copy_position/edit": 0.9}))

    assert [warned(0.1, 0.6), warned(0.9, 0.9), warned(0.6, 0.58)] == [True] * 3
    assert [warned(0.9, 0.6), warned(0.1, 0.4), warned(0.0, 0.0)] == [False] * 3
    # A stage that begins with edits begins by copying.
    assert copies({}, {"copy_rate/edit": 1.0}) == []
    (said,) = copies({"copy_rate/edit": 0.2}, {"copy_rate/edit": 0.75, "copy_rate/multi_edit": 0.9})
    assert "edit: 75% of the held-out edits come out as their input (20% at the measure before)" in said
    record = tmp_path / "metrics.jsonl"
    rows = [{"step": 1, "copy_rate/edit": 0.1}, {"step": 2, "copy_rate/edit": 0.2}, {"step": 3, "loss": 1.0}]
    record.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert last_measured(record)["copy_rate/edit"] == 0.2
    assert last_measured(tmp_path / "none") == {}


@pytest.mark.slow
def test_the_trainer_records_the_rate_and_warns_of_a_model_that_copies(
    run: StageRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Two steps at a rate that changes nothing, from weights that only reconstruct."""
    stage = {"start": ROOT / "assets/shapes/stage2", "steps": 2, "global_batch": 4}
    stage |= {"optimizer.lr": 1e-9, "optimizer.module_lr": {"dit": 1e-9}, "optimizer.warmup": 0, "optimizer.decay": 0}
    logging = {"logging.every": 1, "logging.samples_every": 1, "logging.wandb": "disabled", "sampling.prompts": ()}
    changed = run.changed({f"stage.{name}": value for name, value in stage.items()} | logging)
    assert Trainer(changed, tmp_path).train() == 0
    lines = read_lines(tmp_path / "metrics.jsonl")
    rates = [line["copy_rate/edit"] for line in lines if "copy_rate/edit" in line]
    assert len(rates) == 2
    assert min(rates) >= 0.6
    out = capsys.readouterr().out
    assert out.count("so the model begins to copy") == 1, "not at the first measure"
