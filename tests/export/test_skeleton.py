"""What a stage can train is known without its weights, for the export and for folders of other frameworks."""

from pathlib import Path

import pytest

from tools.export.skeleton import shapes, skeleton
from wemmu.config import load_curriculum
from wemmu.recipes.recipe import recipe
from wemmu.recipes.staged import startable


@pytest.mark.parametrize("name", ["curriculum", "ross", "uae"])
def test_the_skeleton_of_every_recipe_has_the_names_and_shapes_of_its_model(name: str):
    curriculum = load_curriculum(Path(f"configs/shapes/{name}.yaml"))
    run = curriculum.stage_run(curriculum.stages[-1].name)
    assert shapes(skeleton(run)) == {key: list(each.shape) for key, each in startable(recipe(run).model).items()}
