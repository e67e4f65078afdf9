"""An export is a model to begin with: alone, it gives a curriculum its backbones, its bridge and its weights."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.export.conftest import REPOSITORY, Trained
from wemmu.checkpoint.collective import CheckpointError
from wemmu.checkpoint.start import start_from
from wemmu.config import ConfigError, dump, load_curriculum
from wemmu.recipes.recipe import identities, recipe
from wemmu.recipes.staged import startable
from wemmu.recipes.uae.build import build_generator
from wemmu.recipes.uae.config import UAE
from wemmu.recipes.wemmu.config import Bridge
from wemmu.training.start import names_inside


def test_an_export_alone_is_what_a_curriculum_begins_with(trained: Trained, exported: Path, tmp_path: Path):
    """Backbones, bridge, sampling, resolution, timestep shift and weights, all of one folder."""
    overrides = [f"export={exported}", "backbones.dtype=float32"]
    curriculum = load_curriculum(REPOSITORY / "configs/curriculum/finetune.yaml", overrides)
    run = curriculum.stage_run("finetune")
    assert (run.recipe, run.stage.resolution) == (trained.run.recipe, trained.run.stage.resolution)
    before = trained.run.stage.objective.time
    assert run.stage.objective.time.shift_at(64) == before.shift_at(64)
    assert run.sampling.model_copy(update={"prompts": ()}) == trained.run.sampling.model_copy(update={"prompts": ()})
    made = recipe(run)
    # Nothing of the backbones is left for checkpoints to carry.
    assert {name.partition(".")[0] for name in names_inside(run, startable(made.model))} == {"bridge"}
    assert made.encoder(["a red circle"], [[]]).input_ids.numel() > 1
    with torch.no_grad():
        for weight in startable(made.model).values():
            weight.fill_(7.0)
    start_from(exported, startable(made.model), identities(made))
    expected = startable(trained.model)
    assert startable(made.model).keys() == expected.keys()
    assert all(torch.equal(weight, expected[name]) for name, weight in startable(made.model).items())
    # What is set wins; what was resolved needs the export no more.
    changed = load_curriculum(REPOSITORY / "configs/curriculum/finetune.yaml", [*overrides, "sampling.t2i=7"])
    assert (changed.sampling.t2i, changed.sampling.steps) == (7.0, trained.run.sampling.steps)
    dump(curriculum.model_copy(update={"export": tmp_path / "gone"}), tmp_path / "curriculum.yaml")
    assert load_curriculum(tmp_path / "curriculum.yaml").stages == curriculum.stages
    with pytest.raises(ConfigError, match=r"export: .*gone is not an exported pipeline .*wemmu export RUN"):
        load_curriculum(REPOSITORY / "configs/curriculum/finetune.yaml", [f"export={tmp_path / 'gone'}"])


def test_a_field_of_the_bridge_is_added_to_the_exported_bridge(trained: Trained, exported: Path):
    overrides = [f"export={exported}", "backbones.dtype=float32"]
    run = load_curriculum(REPOSITORY / "configs/curriculum/reca.yaml", overrides).stage_run("reca")
    assert trained.run.recipe.bridge.position_table != Bridge().position_table
    assert run.recipe.bridge == trained.run.recipe.bridge.model_copy(update={"reconstruct_without_vae": 1.0})


def test_an_export_is_no_start_beside_other_backbones(trained: Trained, exported: Path, tmp_path: Path):
    copy = shutil.copytree(exported, tmp_path / "copy")
    (name,) = (copy / "vae").glob("*.safetensors")
    weights = load_file(name)
    save_file({key: value + 1 for key, value in weights.items()}, name)
    run = load_curriculum(
        REPOSITORY / "configs/curriculum/finetune.yaml",
        [f"export={exported}", f"backbones.vae={copy / 'vae'}", "backbones.dtype=float32"],
    ).stage_run("finetune")
    made = recipe(run)
    with pytest.raises(CheckpointError, match="was trained with another vae"):
        start_from(exported, startable(made.model), identities(made))
    # UAE's generator is such a start, too.
    generator = {"weights": exported, "bridge": trained.run.recipe.bridge}
    config = UAE.model_validate({"generator": generator, "reward": {"encoder": "pixels"}})
    model, _ = build_generator(trained.run.backbones, config, seed=1)
    expected = startable(trained.model)
    assert all(torch.equal(weight, expected[name]) for name, weight in startable(model).items())
    with pytest.raises(CheckpointError, match="was trained with another vae"):
        build_generator(run.backbones, config, seed=1)
