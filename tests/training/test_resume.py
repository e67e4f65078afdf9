"""A stage resumes only from what is its own: compared with the manifest, on every rank."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.runs import STAGE_RUN
from wemmu.checkpoint.collective import CheckpointError
from wemmu.checkpoint.manifest import FORMAT, Manifest, Origin
from wemmu.config import StageRun
from wemmu.config.task import Task
from wemmu.kernels import Kernels
from wemmu.training import resume

RECORDS = {"t2i/32x32": 8}


@pytest.fixture
def run() -> StageRun:
    return STAGE_RUN


CHOSEN = Kernels("torch", "plain", "flash", "math", compiled=False)


def origin_of(run: StageRun, kernels: Kernels = CHOSEN, device: str = "cpu", **changes: Any) -> Origin:
    origin = Origin(run.stage.name, run.seed, run.stage.resolution, {"vlm": "a" * 64, "vae": "b" * 64})
    return replace(origin, settings=resume.settings(run, RECORDS, kernels, torch.device(device)), **changes)


def manifest_of(run: StageRun, step: int = 2, **changes: Any) -> Manifest:
    origin = origin_of(run, **changes)
    return Manifest(format=FORMAT, step=step, tensors={}, trained=[], files={}, libraries={}, **vars(origin))


def test_an_unchanged_stage_resumes_in_silence(run: StageRun):
    assert resume.check(Path("step"), manifest_of(run), origin_of(run), run) == []


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"stage": "other"}, "it is of the stage other"),
        ({"frozen": {"vlm": "c" * 64, "vae": "b" * 64}}, "trained with another vlm"),
        ({"frozen": {"vlm": "a" * 64, "vae": "b" * 64, "dit": "d" * 64}}, "dit was frozen in it and is trained here"),
        ({"resolution": 4096}, "it was trained at 4096 px"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(run: StageRun, made: dict[str, Any], words: str):
    with pytest.raises(CheckpointError, match=words):
        resume.check(Path("step"), manifest_of(run, **made), origin_of(run), run)


def test_a_checkpoint_with_more_steps_than_the_stage_says_so(run: StageRun):
    with pytest.raises(CheckpointError, match=f"it has {run.stage.steps + 1} steps, and the stage ends after"):
        resume.check(Path("step"), manifest_of(run, run.stage.steps + 1), origin_of(run), run)


@pytest.mark.parametrize("fields", [{"seed": 99}, {"stage.global_batch": 64}, {"stage.mixture": {Task.T2I: 1.0}}])
def test_what_changes_the_order_of_samples_is_refused_unless_told(run: StageRun, fields: dict[str, Any]):
    now = run.changed(fields)
    with pytest.raises(CheckpointError, match=r"other samples would follow: .* -> .*data.resume_reordered=true"):
        resume.check(Path("step"), manifest_of(run), origin_of(now), now)
    told = now.changed({"data.resume_reordered": True})
    assert len(resume.check(Path("step"), manifest_of(run), origin_of(told), told)) > 0


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("stage.optimizer.lr", 0.5, "optimizer.lr: 0.001 -> 0.5"),
        ("recipe.bridge.queries.std", 0.25, "recipe.bridge.queries.std: 1.0 -> 0.25"),
    ],
)
def test_what_may_change_is_named_and_taken(run: StageRun, field: str, value: float, said: str):
    now = run.changed({field: value})
    assert resume.check(Path("step"), manifest_of(run), origin_of(now), now) == [said]


def test_another_device_with_its_own_noise_and_kernels_is_named_and_taken(run: StageRun):
    moved = origin_of(run, replace(CHOSEN, noise="device", norms="torch", refused=("told elsewhere",)), "cuda")
    said = ["kernels.device: cpu -> cuda", "kernels.norms: plain -> torch", "kernels.noise: host -> device"]
    assert resume.check(Path("step"), manifest_of(run), moved, run) == said


@pytest.mark.parametrize("kept", ["everything but kernels", "nothing"])
def test_noise_that_moves_to_the_device_is_named_where_no_source_was_recorded(run: StageRun, kept: str):
    made = manifest_of(run)
    recorded = {f: v for f, v in made.settings.items() if not f.startswith("kernels.") and kept != "nothing"}
    moved = origin_of(run, replace(CHOSEN, noise="device", norms="torch"), "cuda")
    old = replace(made, settings=recorded)
    assert resume.check(Path("step"), old, moved, run) == ["kernels.noise: host -> device"]


def test_fields_that_an_earlier_version_had_elsewhere_are_compared(run: StageRun):
    """It recorded those of all recipes, outside of `recipe`."""
    made = manifest_of(run)
    new = ("recipe.kind", "recipe.lora")
    old = {field.removeprefix("recipe."): value for field, value in made.settings.items() if field not in new}
    rates = {"optimizer.dit_lr": old.pop("optimizer.module_lr.dit"), "optimizer.head_lr": None}
    old |= {"reconstruction.target": "pixels", **rates}
    assert resume.check(Path("step"), replace(made, settings=old), origin_of(run), run) == []
    old["bridge.queries.std"] = 0.25
    old["optimizer.dit_lr"] = 0.5
    said = {"recipe.bridge.queries.std: 0.25 -> 1.0", "optimizer.module_lr.dit: 0.5 -> 0.0001"}
    assert set(resume.check(Path("step"), replace(made, settings=old), origin_of(run), run)) == said


def test_the_first_manifests_compare_the_seed_alone(run: StageRun):
    old = replace(manifest_of(run), settings={})
    assert resume.check(Path("step"), old, origin_of(run), run) == []
    assert resume.samples_seen(old) is None
    with pytest.raises(CheckpointError, match="seed"):
        resume.check(Path("step"), replace(old, seed=99), origin_of(run), run)


def test_what_an_earlier_version_did_not_record_is_not_called_changed(run: StageRun):
    made = manifest_of(run)
    old = replace(made, settings={field: value for field, value in made.settings.items() if "recipe" not in field})
    assert resume.check(Path("step"), old, origin_of(run), run) == []


def test_samples_are_counted_across_changes_of_the_batch(run: StageRun):
    manifest = manifest_of(run, 10, first_step=4, first_samples=100)
    assert resume.samples_seen(manifest) == 100 + 6 * run.stage.global_batch
