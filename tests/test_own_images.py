"""docs/own-images.md, typed as it stands, on images that are made here."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from wemmu import plan
from wemmu.command_line import program
from wemmu.config import load_curriculum
from wemmu.planning.plan import parameters_of

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/own-images.md").read_text()
CONFIG = ROOT / "configs/examples/my-images.yaml"
FEW = " --set stages.stage1.steps=2"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def typed(folder: Path, *command: str) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def make_images(folder: Path) -> None:
    for number in range(12):
        image = Image.new("RGB", (200 + 20 * number, 180), (20 * number, 80, 200))
        ImageDraw.Draw(image).ellipse((20, 20, 150, 150), fill=(250, 20 * number, 0))
        kind = ("jpg", "png", "webp", "JPG")[number % 4]
        file = folder / ("inner" if number % 2 else "") / f"ball{number}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file)
        file.with_suffix(".txt").write_text(f"a ball, number {number}\n")


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A folder like a clone, whose images the page's Python has listed."""
    for name in ("assets", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    make_images(tmp_path / "my-images")
    (script,) = blocks("python")
    typed(tmp_path, sys.executable, "-c", script)
    return tmp_path


def test_the_list_has_every_image(listed: Path) -> None:
    rows = [json.loads(line) for line in (listed / "my-images/list.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    for row in rows:
        number = re.search(r"\d+", row["image"])
        assert (listed / "my-images" / row["image"]).is_file()
        assert number
        assert row["caption"] == f"a ball, number {number[0]}"


@pytest.mark.slow
def test_the_commands_of_the_page_run(listed: Path) -> None:
    # With fewer steps, and by the `wemmu` of this checkout.
    commands = re.sub(r"(wemmu (?:data \w+|run) .*)", lambda line: line[0] + FEW, "".join(blocks("bash")))
    commands = commands.replace("wemmu ", f"{sys.executable} -m wemmu ")
    typed(listed, "bash", "-ec", commands)
    assert json.loads((listed / "runs/my-images-data/dataset.json").read_text())
    assert not (listed / "runs/my-images-data/rejected.jsonl").read_text()
    assert "stage1" in (listed / "runs/my-images/report.html").read_text()
    assert Image.open(listed / "ball.png").size == Image.open(listed / "exported.png").size == (256, 64)
    # The export draws what the run draws.
    assert Image.open(listed / "ball.png").tobytes() == Image.open(listed / "exported.png").tobytes()


@pytest.fixture
def for_gpu(tmp_path: Path) -> Path:
    """The config with its lines for a GPU."""
    text, number = re.subn(r"^( *\w+: ).*?  # GPU: (.*)$", r"\1\2", CONFIG.read_text(), flags=re.M)
    assert number == 7
    (tmp_path / "gpu.yaml").write_text(text)
    return tmp_path / "gpu.yaml"


def test_the_lines_for_a_gpu_make_a_model(for_gpu: Path) -> None:
    curriculum = load_curriculum(for_gpu)
    (stage,) = curriculum.stages
    assert stage.start is None
    assert "dit" not in stage.trains
    # The published sizes.
    assert parameters_of(curriculum)["parts"]["dit"] > 1e9


@pytest.mark.slow
def test_the_lines_for_a_gpu_make_a_plan(for_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which refuses a resolution that the position table cannot hold."""
    monkeypatch.chdir(for_gpu.parent)
    done = CliRunner().invoke(program(plan.main), [for_gpu.name])
    assert done.exit_code == 0, done.output
