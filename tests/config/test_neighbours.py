"""A path to the neighbour of what a field needs is answered with what to give."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from data_pipeline.contents import look
from data_pipeline.inspect import inspect
from tests.config.curricula import tree, write
from wemmu.checkpoint.collective import CheckpointError
from wemmu.checkpoint.manifest import read_manifest
from wemmu.config import ConfigError, load_curriculum
from wemmu.config.schema import Backbones
from wemmu.config.shards import DataSet, ShardError
from wemmu.published.check import problems


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as to its names: a stage with two checkpoints, an export and, beside it, shards."""
    run = tmp_path / "run"
    for step in (2, 4):
        (folder := run / f"stage1/checkpoints/step_{step:08d}").mkdir(parents=True)
        (folder / "manifest.json").write_text(json.dumps({"step": step}))
    for file in ("curriculum.yaml", "stage1/config.yaml", "export/model_index.json", "../shards/dataset.json"):
        (run / file).parent.mkdir(exist_ok=True)
        (run / file).write_text("{}")
    return run


@pytest.mark.parametrize(
    ("given", "kind"),
    [("", "a run"), ("stage1", "a stage of a run"), ("stage1/checkpoints", "a folder of checkpoints")],
)
def test_weights_are_asked_of_what_holds_a_checkpoint(run: Path, given: str, kind: str) -> None:
    newest = run / "stage1/checkpoints/step_00000004"
    with pytest.raises(CheckpointError, match=f"{run / given} is {kind}: give its checkpoint {newest}"):
        read_manifest(run / given)


def test_every_field_says_what_it_was_given(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=f"is a run: give {run / 'export'}"):
        load_curriculum(write(run.parent, tree() | {"export": str(run)}))
    with pytest.raises(ConfigError, match=r"is a stage of a run: `wemmu export .*stage1 --out DIR` writes"):
        load_curriculum(write(run.parent, tree() | {"export": str(run / "stage1")}))
    for given, kind in ((run, "a run"), (run / "curriculum.yaml", "a file"), (run / "export", "a pipeline")):
        with pytest.raises(ShardError, match=f"{given} is {kind}: give a data set"):
            DataSet.at(given)
    monkeypatch.chdir(run.parent)
    for name, kind in (("run", "a run"), ("shards", "a data set"), ("Qwen/Qwen2.5-VL", "not on this machine")):
        assert f"{name} is {kind}" in "; ".join(problems(Backbones(vlm=name), ("vlm",)))


def test_what_is_no_data_set_is_not_looked_into_in_vain(run: Path) -> None:
    for given, kind in ((run, "a run"), (run / "curriculum.yaml", "a file")):
        for look_at in (look, lambda root: inspect(root, Console(quiet=True))):
            with pytest.raises(ShardError, match=f"{given} is {kind}: give a data set"):
                look_at(given)
