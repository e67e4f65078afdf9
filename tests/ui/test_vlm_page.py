"""The page of recipes that tune a VLM, in a real browser: real runs of a step, and their exports."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from selenium.webdriver import Chrome

from tests.ui.conftest import ROOT, page_of
from tests.ui.test_page import SCENE, Visitor
from tools.convert_ckpt import main as convert
from wemmu.config import dump, load_curriculum
from wemmu.shapes.language import full_caption
from wemmu.shapes.render import render
from wemmu.source import settings_of
from wemmu.training.trainer import Trainer

pytestmark = [pytest.mark.browser, pytest.mark.slow]
# Recipe -> its last stage, the task of its records, and what makes a step of it cheap.
RECIPES = {
    "ross": ("tune", "understanding", ["sampling.steps=2"]),
    "uae": ("reward", "caption", ["recipe.generator.steps=2", "recipe.reward={encoder: pixels}"]),
}


@pytest.fixture(scope="module", params=RECIPES)
def tuned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder: one step of the last stage of the shipped config on shards of its own, and the export."""
    folder, config = tmp_path_factory.mktemp("tuned") / request.param, ROOT / f"configs/shapes/{request.param}.yaml"
    stage, task, cheap = RECIPES[request.param]
    data = f"data={{shards: {folder / 'data'}, prepare: {{sources: [{{kind: shapes, samples: {{{task}: 8}}}}]}}}}"
    only = [f"stages.{stage}.{field}" for field in ("steps=1", "global_batch=2", "optimizer={lr: 1.0e-4}")]
    overrides = [*cheap, *only, data, "logging.wandb=disabled", "sampling.prompts=[]", "threads=1"]
    settings = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, "-m", "data_pipeline", "write", config, "--workers", "0", *settings]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    run = load_curriculum(config, overrides).stage_run(stage)
    (folder / stage).mkdir()
    dump(run, folder / stage / "config.yaml")
    assert Trainer(run, folder / stage).train() == 0
    convert(folder, folder / "export", forward=False)
    return folder


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    render(SCENE, 64).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"


@pytest.fixture(params=["run", "export"])
def visitor(request: pytest.FixtureRequest, chromium: Chrome, tuned: Path) -> Iterator[Visitor]:
    with page_of(tuned if request.param == "run" else tuned / "export") as address:
        yield Visitor(chromium, address)


def answers(visitor: Visitor, count: int = 1) -> list[str]:
    """Start, and wait for the finished answers."""
    # An answer may come before anybody sees that the page was empty, so the old ones are marked.
    visitor.chrome.execute_script("document.querySelectorAll('#results .words').forEach(e => e.dataset.old = 1)")
    visitor.click("#generate")
    visitor.until(lambda: not visitor.all("#results .words[data-old]"))
    visitor.until(lambda: len(visitor.all("#results .words")) == count and not visitor.all("#results .progress"))
    return visitor.words("#results .words")


def test_an_image_is_questioned_captioned_and_made_again(visitor: Visitor, tuned: Path, scene: Path):
    name, exported = tuned.name, "export," in visitor.words("#heading p")[0]
    visitor.fails("A question needs an image; give one.")
    visitor.upload(scene)
    (caption,) = answers(visitor)
    # A step has changed next to nothing of the shipped VLM.
    assert caption == full_caption(SCENE)
    # A caption has an image that was made again, which the scorer judges; an export leaves out what makes images.
    assert len(visitor.all("#results .verdict")) == (not exported)
    visitor.click("#results a[download]")
    file = visitor.chrome.downloads / f"{'export' if exported else RECIPES[name][0]}-seed-0.png"
    visitor.until(file.exists)
    downloaded = Image.open(file)
    assert settings_of(downloaded)["task"] == "understanding"
    same = downloaded.convert("RGB").tobytes() == Image.open(scene).convert("RGB").tobytes()
    assert same == exported
    visitor.prompt("how many shapes are there?")
    (answer,) = answers(visitor)
    assert answer != caption
    # The head of ROSS restores the image whatever is asked; UAE draws captions only.
    assert len(visitor.all("#results .verdict")) == (not exported and name == "ross")
    if exported:
        # The stage beside it has what the export leaves out, and says the same.
        visitor.click("#stages label")
        assert answers(visitor, 2) == [answer, answer]
