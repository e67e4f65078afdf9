"""The command lines on a checkpoint of the real model with random weights."""

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tools import convert_ckpt
from wemmu import evaluate, sample, train
from wemmu.checkpoint import store
from wemmu.checkpoint.manifest import Origin
from wemmu.command_line import FINAL
from wemmu.config import Curriculum, dump, load_stage
from wemmu.config.schema import Backbones
from wemmu.parallel.single import SingleEngine
from wemmu.recipes.wemmu.build import build_model
from wemmu.recipes.wemmu.loss import FlowMatchingLoss


@pytest.fixture(scope="module")
def stage(backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stage's folder after its one step."""
    curriculum = Curriculum.model_validate(
        {
            "name": "tiny",
            "backbones": backbones,
            "recipe": {"kind": "wemmu", "bridge": {"position_table": 8}},
            "data": {"shards": "none"},
            "memory": {"micro_batch": 1, "reference_resolution": 32},
            "sampling": {"steps": 2},
            "threads": 1,
            "stages": [
                {
                    "name": "only",
                    "resolution": 32,
                    "steps": 1,
                    "global_batch": 2,
                    "trains": ["pathway", "position_mlp", "vae_branch"],
                    "optimizer": {"lr": 1e-3},
                    "mixture": {"t2i": 1.0, "multi_edit": 1.0},
                }
            ],
        }
    )
    run = curriculum.stage_run("only")
    folder = tmp_path_factory.mktemp("run") / "only"
    folder.mkdir()
    dump(run, folder / "config.yaml")
    model, reports = build_model(run.backbones, run.recipe.bridge, run.seed)
    model.freeze_all_but(run.stage.trains)
    engine = SingleEngine(model, FlowMatchingLoss(model, run), run)
    engine.step(1.0)
    frozen = {name: report.sha256 for name, report in reports.items()}
    store.save(folder / "checkpoints", engine.state(), {}, Origin("only", run.seed, 32, frozen))
    return folder


def test_checkpoint_is_scored(stage: Path, capsys: pytest.CaptureFixture[str]):
    evaluate.main(stage, prompts=2, checkpoint=None)
    results = json.loads((stage / "evaluation.json").read_text())
    assert results["checkpoint"] == {"stage": "only", "step": 1, "ema": False}
    assert set(results["tasks"]) == {"t2i", "multi_edit"}
    assert results["tasks"]["t2i"]["test"]["measures"]["satisfied"]["count"] == 2
    assert re.search(r"^Text to image +0\.0%  \[0\.0%, 65\.8%\]  0 of 2$", capsys.readouterr().out, re.MULTILINE)
    # Random weights draw nothing that could be read.
    assert results["tasks"]["t2i"]["test"]["measures"]["satisfied"]["successes"] == 0
    sizes = {Image.open(file).size for file in (stage / "evaluation/images").glob("*.png")}
    assert sizes == {(32, 32)}


def test_what_cannot_be_scored_is_refused(stage: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit, match="--prompts N"):
        evaluate.main(stage, prompts=None, checkpoint=None)
    with pytest.raises(SystemExit) as refusal:
        evaluate.main(tmp_path, prompts=2, checkpoint=None)
    # No further attempt would help.
    assert refusal.value.code == FINAL
    said = capsys.readouterr().err
    assert "is not a run; " in said
    assert "valid choices: a run folder" in said
    (tmp_path / "config.yaml").write_text((stage / "config.yaml").read_text())
    with pytest.raises(SystemExit, match="has no checkpoint; train it first"):
        evaluate.main(tmp_path, prompts=2, checkpoint=None)
    with pytest.raises(SystemExit, match="is not a checkpoint"):
        evaluate.main(stage, prompts=2, checkpoint=tmp_path)


def test_a_run_finds_its_backbones_from_another_folder(
    stage: Path,
    backbones: Backbones,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    run = tmp_path / "run"
    shutil.copytree(stage, run / "only")
    # Begun where the backbones are, which are named by relative paths.
    monkeypatch.chdir(backbones.vlm.parent)
    near = load_stage(stage / "config.yaml").model_copy(update={"backbones": Backbones(vlm="vlm", sana="sana")})
    dump(near, run / "only/config.yaml")
    monkeypatch.chdir(tmp_path)
    evaluate.main(Path("run"), prompts=1, checkpoint=None, as_json=True)
    # Nothing but JSON on stdout.
    assert json.loads(capsys.readouterr().out) == json.loads(Path("run/only/evaluation.json").read_text())
    for name in ("sample.png", "sample-2.png"):
        sample.main(Path("run"), prompt="a red circle", size=None, steps=1)
        assert (tmp_path / name).is_file()
    exported = convert_ckpt.find(Path("run")).run.backbones
    assert (exported.vlm.resolve(), exported.dit.resolve()) == (backbones.vlm.resolve(), backbones.dit.resolve())


@pytest.mark.parametrize("command", ["train", "evaluate", "export"])
def test_a_backbone_that_cannot_be_loaded_ends_every_job_for_good_and_is_named(
    stage: Path, backbones: Backbones, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str
):
    folder = tmp_path / "run/only"
    # Images that are there need no model.
    shutil.copytree(stage, folder, ignore=shutil.ignore_patterns("evaluation"))
    shutil.copytree(backbones.vae.parent, tmp_path / "sana")
    config = tmp_path / "sana/transformer/config.json"
    config.write_text(config.read_text().replace("SanaTransformer2DModel", "FluxTransformer2DModel"))
    run = load_stage(stage / "config.yaml")
    dump(
        run.model_copy(update={"backbones": Backbones(vlm=backbones.vlm, sana=tmp_path / "sana")}),
        folder / "config.yaml",
    )
    commands = {
        "train": lambda: train.main(folder / "config.yaml"),
        "evaluate": lambda: evaluate.main(folder, prompts=1, checkpoint=None),
        "export": lambda: convert_ckpt.main(folder, out=tmp_path / "out", dtype=None),
    }
    with pytest.raises(SystemExit) as ended:
        commands[command]()
    assert ended.value.code == FINAL
    assert f"{config} describes FluxTransformer2DModel; valid choices: SanaTransformer2DModel" in capfd.readouterr().err


def test_run_draws_images(stage: Path, tmp_path: Path):
    """Image i is drawn from seed + i; the size is height x width."""
    out = [tmp_path / f"{name}.png" for name in ("both", "second", "other")]
    sample.main(stage.parent, out[0], prompt="a red circle", size="32x48", seed=3, count=2, steps=1)
    sample.main(stage, out[1], prompt="a red circle", size="32x48", seed=4, steps=1)
    sample.main(stage, out[2], prompt="a red circle", size="32x48", seed=4, steps=1, guidance=1.0)
    both, second, other = map(Image.open, out)
    assert both.size == (96, 32)
    assert both.crop((48, 0, 96, 32)).tobytes() == second.tobytes()
    assert other.tobytes() != second.tobytes()


def test_input_images_are_used(stage: Path, tmp_path: Path):
    drawn = []
    for color in ("red", "blue"):
        Image.new("RGB", (50, 40), color).save(tmp_path / "in.png")
        images = [tmp_path / "in.png"] * 2
        sample.main(stage, tmp_path / "out.png", prompt="put it there", image=images, size=None, steps=1)
        drawn.append(Image.open(tmp_path / "out.png").tobytes())
    assert drawn[0] != drawn[1]


def test_impossible_size_is_explained(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    # The weights are not loaded for it.
    monkeypatch.setattr("wemmu.training.build.load_trained", None)
    with pytest.raises(SystemExit, match=r"--solver huen is unknown; did you mean heun\? valid: euler, heun"):
        sample.main(stage, tmp_path / "out.png", prompt="a red circle", solver="huen")
    with pytest.raises(SystemExit, match="multiples of 16"):
        sample.main(stage, tmp_path / "out.png", prompt="a red circle", size="40")
    with pytest.raises(SystemExit, match="height is 256 px; the largest that this model generates is 128 px"):
        sample.main(stage, tmp_path / "out.png", prompt="a red circle", size="256")
