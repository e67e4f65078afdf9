"""The README is true: `python -m benchmarks.prompts` measures the prompts that it shows, and its config is valid."""

import re
from pathlib import Path

import pytest

from benchmarks.prompts import right
from wemmu.config import load_curriculum
from wemmu.shapes.instructions import target_of
from wemmu.shapes.language import full_caption
from wemmu.shapes.render import render
from wemmu.shapes.scene import Object, Scene

ROOT = Path(__file__).resolve().parents[1]
SHOWN = {prompt.text for prompt in load_curriculum(ROOT / "configs/shapes/curriculum.yaml").sampling.prompts}


@pytest.mark.parametrize("file", ["README.md", "wemmu/pipeline/__init__.py", "tools/export/card.py"])
def test_every_prompt_that_is_shown_is_measured(file: str):
    text = (ROOT / file).read_text(encoding="utf-8")
    prompts = re.findall(r'(?:pipe\(|--prompt )"([^"]+)"', text)
    assert prompts
    assert set(prompts) <= SHOWN


def test_the_config_of_the_readme_is_valid(tmp_path: Path):
    (config,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)
    (tmp_path / "mine.yaml").write_text(config)
    assert [stage.resolution for stage in load_curriculum(tmp_path / "mine.yaml").stages] == [512, 1024]


def test_an_image_counts_as_right_only_if_it_equals_the_target():
    circle, square = Object(0, "circle", "red", "large"), Object(3, "square", "blue", "small")
    scene = Scene("white", (circle, square))
    images = [render(scene, (64, 64)), render(Scene("white", (circle,)), (64, 64))]
    assert right(full_caption(scene), [], images) == 1
    assert right("remove the square", images[:1], images) == 1
    assert right("", images[:1], images) == 1
    green = target_of("make the circle green", [scene])
    assert green.at(0) == Object(0, "circle", "green", "large")
    other = Scene("black", (Object(1, "triangle", "green", "small"),))
    replaced = target_of("replace the circle with the object of the second image", [scene, other])
    assert replaced.at(0) == Object(0, "triangle", "green", "small")
    with pytest.raises(ValueError, match="means no object"):
        target_of("make the triangle green", [scene])
