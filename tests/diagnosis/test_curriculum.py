"""What is wrong with a curriculum on this machine."""

from collections import namedtuple
from pathlib import Path

import pytest

from tests.diagnosis.test_checks import is_problem, put
from tests.planning.worlds import MINIATURE, PAPER, ROOT, curriculum_with, write_published
from wemmu.config import Curriculum, load_curriculum
from wemmu.config.schema import Backbones
from wemmu.diagnosis import curriculum as curricula
from wemmu.diagnosis import preflight

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture
def miniature(monkeypatch: pytest.MonkeyPatch) -> Curriculum:
    monkeypatch.chdir(ROOT)
    return load_curriculum(MINIATURE)


def test_the_miniature_can_run_here(miniature: Curriculum, tmp_path: Path):
    for check, *arguments in curricula.calls(miniature, tmp_path):
        assert check(*arguments).status != "problem", check(*arguments)


def test_a_curriculum_that_does_not_load_is_told_in_its_own_words(tmp_path: Path):
    wrong = put(tmp_path, "wrong.yaml", f"base: {MINIATURE}\noverrides: [stages.stage1.steps=-1]\n")
    is_problem(preflight.loads(wrong), "stages.0.steps", "greater than 0")
    is_problem(preflight.loads(tmp_path / "nowhere.yaml"), "nowhere.yaml")


def test_a_backbone_that_is_missing_or_incomplete_is_named(published: Backbones, tmp_path: Path):
    gone = curriculum_with(PAPER, published.model_copy(update={"vlm": tmp_path / "gone"}))
    is_problem(preflight.backbones(gone), "gone is not a directory")
    # What follows from it is said once, as a problem.
    assert preflight.degrees(gone).status == curricula.gpu_memory(gone).status == "warning"
    assert preflight.checkpoint_disk(gone, tmp_path).status == "warning"
    # Only the config.json files are there.
    is_problem(
        preflight.backbones(curriculum_with(PAPER, published)), "neither model.safetensors", "preprocessor_config"
    )


def test_degrees_that_cannot_be_are_refused(published: Backbones):
    overrides = ["parallel.engine=hybrid", "parallel.tp=32", "parallel.ranks=32"]
    is_problem(preflight.degrees(curriculum_with(PAPER, published, *overrides)), "not outnumber its heads; valid: 1, 2")


def test_a_published_backbone_that_is_not_here_is_one_problem(tmp_path: Path):
    """What follows from its sizes is known all the same."""
    paper = load_curriculum(PAPER)
    is_problem(preflight.backbones(paper), "Qwen2.5-VL-3B-Instruct is not a directory")
    assert preflight.degrees(paper).status == "ok"
    assert "for a stage" in preflight.checkpoint_disk(paper, tmp_path).found


def test_data_must_be_there_or_preparable(miniature: Curriculum, tmp_path: Path):
    def with_data(**fields: object) -> Curriculum:
        return miniature.model_copy(update={"data": miniature.data.model_copy(update=fields)})

    assert preflight.data(with_data(shards=tmp_path)).status == "ok"
    is_problem(preflight.data(with_data(shards=tmp_path, prepare=None)), "no complete data set")
    put(tmp_path, "foreign/notes.txt")
    is_problem(preflight.data(with_data(shards=tmp_path / "foreign")), "not empty and not a data set")
    shards = tmp_path / "shards"
    source = {"kind": "webdataset", "name": "web", "path": f"{tmp_path}/*.tar"}
    edits = {"kind": "edits", "name": "edits", "path": f"{tmp_path}/*"}
    prepare = type(miniature.data.prepare).model_validate({"sources": [source, edits]})
    is_problem(preflight.data(with_data(shards=shards, prepare=prepare)), "web:", "*.tar")
    put(tmp_path, "one.tar")
    assert preflight.data(with_data(shards=shards, prepare=prepare)).status == "ok"
    words = type(miniature.data.prepare).model_validate({"sources": [source]})
    is_problem(preflight.data(with_data(shards=shards, prepare=words)), "stage3: edit at 64 px", "web: t2i")
    put(shards, "dataset.json", '{"version": 2, "streams": []}')
    is_problem(preflight.data(with_data(shards=shards)), "has no record for", "stage1: t2i at 32 px")


def test_weights_to_start_from_must_be_there(miniature: Curriculum):
    wrong = load_curriculum(MINIATURE, ["stages.stage2.start=nowhere"])
    is_problem(preflight.starts(wrong), "stages.stage2.start: nowhere")
    assert preflight.starts(load_curriculum(MINIATURE.parent / "demo.yaml")).status == "ok"


def test_images_of_the_fixed_prompts_must_be_there(miniature: Curriculum):
    assert preflight.sample_images(miniature).status == "ok"
    wrong = load_curriculum(MINIATURE, ["sampling.prompts=[{text: a, images: [assets/shapes/examples/gone.png]}]"])
    is_problem(preflight.sample_images(wrong), "gone.png")


def test_a_disk_must_hold_one_checkpoint_more_than_is_kept(
    miniature: Curriculum, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def free(size: float) -> str:
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: Usage(size, 0, size))
        return preflight.checkpoint_disk(miniature, tmp_path).status

    assert [free(1e6), free(0.6e9), free(1e12)] == ["problem", "warning", "ok"]


def test_a_plan_that_no_memory_holds_is_told(miniature: Curriculum, monkeypatch: pytest.MonkeyPatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(curricula, "host_bytes", lambda: 1e9)
    assert curricula.host_memory(miniature).status == "warning"
    small = namedtuple("GPU", "total_memory")(1e8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: small)
    is_problem(curricula.gpu_memory(miniature), "100 MB here", "micro_batch")
    is_problem(curricula.host_memory(miniature), "1 GB here")


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("recipe.lora={dit: {rank: 4, targets: [nope]}}", "nope"),
        ("recipe.bridge.states={layers: 99, combine: stack}", "99"),
    ],
)
def test_what_the_model_refuses_is_said_before_anything_is_queued(tmp_path: Path, override: str, words: str):
    found = preflight.checkpoint_disk(load_curriculum(MINIATURE, [override]), tmp_path)
    assert (found.name, found.status) == ("model", "problem")
    assert words in found.found
