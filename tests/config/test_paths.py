"""Where the paths of a config lead: home, the working directory, and from a run folder the one it was begun in."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from launcher.folder import changes
from tests.config.curricula import tree, write
from wemmu.config import Curriculum, dump, load_curriculum, load_stage
from wemmu.config.load import load_traced
from wemmu.config.schema import Backbones


def located() -> dict[str, Any]:
    """A curriculum that names a path of every kind."""
    content = tree()
    sources = [
        {"kind": "webdataset", "name": "web", "path": "raw/*.tar"},
        {"kind": "edits", "name": "edits", "path": "raw/edits.jsonl", "root": "raw"},
        {"kind": "parquet", "name": "far", "path": "s3://bucket/~/x.parquet"},
    ]
    content["data"]["prepare"] = {"sources": sources, "caption": {"vlm": "vlm"}}
    content["sampling"] = {"prompts": [{"images": ["raw/1.png"]}]}
    content["stages"][0]["start"] = "begin"
    return content


def paths(config: Curriculum) -> list[str]:
    prepare, first = config.data.prepare, config.stages[0]
    assert prepare is not None
    assert prepare.caption is not None
    named = [config.backbones.vlm, config.backbones.vae.parent, config.data.shards, prepare.caption.vlm, first.start]
    named += [config.sampling.prompts[0].images[0]]
    sources = [text for s in prepare.sources for text in (s.path, getattr(s, "root", None)) if text]
    return [*map(str, named), *sources]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory in which everything that `located` names is there, and a run folder below it."""
    root = tmp_path / "checkout"
    for folder in ("vlm", "sana/vae", "sana/transformer", "shards", "begin", "raw", "runs/one/first"):
        (root / folder).mkdir(parents=True)
    for file in ("raw/1.png", "raw/edits.jsonl"):
        (root / file).touch()
    monkeypatch.chdir(root)
    config = load_curriculum(write(root, located()))
    dump(config, root / "runs/one/curriculum.yaml")
    dump(config.stage_run("first"), root / "runs/one/first/config.yaml")
    return root


def test_a_tilde_is_the_home_directory_in_every_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    text = write(tmp_path, located()).read_text()
    for name in ("vlm", "sana", "shards", "begin"):
        text = text.replace(f": {name}\n", f": ~/{name}\n")
    config = load_curriculum(write(tmp_path, text.replace("raw/", "~/raw/").replace("root: raw", "root: ~/raw")))
    assert [p for p in paths(config) if not p.startswith(f"{tmp_path}/")] == ["s3://bucket/~/x.parquet"]


def test_a_path_is_looked_for_beside_the_file_that_names_it_then_from_where_the_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Also where a base names it; what is typed is meant from where it is typed, and so is what is yet to be."""
    for folder in ("own/raw", "base/vlm", "base/sana/vae", "here/vlm", "here/begin"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "own/raw/1.png").touch()
    write(tmp_path / "base", located(), "base.yaml")
    own = {"base": "../base/base.yaml", "sampling": {"prompts": [{"images": ["raw/1.png"]}]}}
    file = write(tmp_path / "own", own)
    monkeypatch.chdir(tmp_path / "here")
    config = load_curriculum(file, ["stages.first.start=vlm"])
    assert config.backbones.vlm == tmp_path / "base/vlm"
    assert config.backbones.vae == tmp_path / "base/sana/vae"
    assert config.sampling.prompts[0].images[0] == tmp_path / "own/raw/1.png"
    assert (config.data.shards, config.stages[0].start) == (Path("shards"), Path("vlm"))
    # Two directories of that name: it says which is meant, once.
    load_curriculum(file)
    said = f"vlm means the one beside the config, {tmp_path / 'base/vlm'}, not {tmp_path / 'here/vlm'}"
    assert capsys.readouterr().err.count(said) == 1
    (tmp_path / "base/raw").mkdir()
    sources = [source.path for source in load_curriculum(file).data.prepare.sources]
    assert sources == [str(tmp_path / "base/raw/*.tar"), "raw/edits.jsonl", "s3://bucket/~/x.parquet"]


def test_where_a_field_comes_from(tmp_path: Path):
    content = tree() | {"logging": {"every": 7}}
    write(tmp_path, content, "base.yaml")
    file = write(tmp_path, {"base": "base.yaml", "overrides": ["stages.*.steps=90"], "seed": 3})
    _, origins = load_traced(file, Curriculum, ["stages.second.steps=80"])
    assert origins["seed"] == str(file)
    assert origins["logging.every"] == str(tmp_path / "base.yaml")
    assert origins["stages.0.steps"] == f"{file} (overrides)"
    assert origins["stages.1.steps"] == "--set"
    assert "threads" not in origins


def test_a_home_that_nobody_knows_is_an_error_not_a_traceback(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match="nobody-by-this-name/x: there is no home directory"):
        Backbones(vlm="~nobody-by-this-name/x", sana="sana")


def test_a_run_folder_is_read_alike_from_everywhere(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    here = load_curriculum(checkout / "runs/one/curriculum.yaml")
    assert paths(here) == paths(load_curriculum(checkout / "curriculum.yaml"))
    monkeypatch.chdir(tmp_path)
    there = load_curriculum(checkout / "runs/one/curriculum.yaml")
    assert [p for p in paths(there) if "://" not in p] == [f"checkout/{p}" for p in paths(here) if "://" not in p]
    assert load_stage(checkout / "runs/one/first/config.yaml").backbones == there.backbones
    # The launcher takes them for one curriculum, and what it writes from here is read alike from there.
    dump(there, checkout / "runs/one/curriculum.yaml")
    monkeypatch.chdir(checkout)
    assert not list(changes(load_curriculum(checkout / "runs/one/curriculum.yaml"), here))


@pytest.mark.parametrize("moved", ["the run folder", "all of it", "the run folder, to where nothing is known"])
def test_a_run_folder_can_be_moved(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moved: str):
    here = paths(load_curriculum(checkout / "runs/one/curriculum.yaml"))
    if moved == "the run folder":
        shutil.move(checkout / "runs/one", tmp_path / "elsewhere")
        run = tmp_path / "elsewhere"
    else:
        shutil.move(checkout, tmp_path / "moved")
        run = tmp_path / "moved/runs/one"
        if "nothing" in moved:
            run = Path(shutil.move(run, tmp_path / "elsewhere"))
        # As it was before there was a folder written down.
        monkeypatch.chdir(tmp_path / "moved")
    assert paths(load_curriculum(run / "curriculum.yaml")) == here


def test_what_is_yet_to_be_written_goes_to_where_the_run_was_begun(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (checkout / "shards").rmdir()
    monkeypatch.chdir(tmp_path)
    assert load_curriculum(checkout / "runs/one/curriculum.yaml").data.shards == Path("checkout/shards")
