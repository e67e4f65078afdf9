"""What an export may replace: an earlier one alone, whole or not at all."""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from tests.export.conftest import Trained
from tools.convert_ckpt import main
from tools.export import replacing


def test_what_is_no_export_is_not_replaced(trained: Trained, tmp_path: Path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model_index.json").write_text('{"_class_name": "SanaPipeline"}')
    for out in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(SystemExit, match="not an earlier export"):
            main(trained.folder, out=out)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["model_index.json", "notes.txt"]
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_export_with_a_users_own_files_in_it_is_left_alone(trained: Trained, exported: Path, tmp_path: Path):
    """As after `git init` or an upload to a hub from the export's folder."""
    out = shutil.copytree(exported, tmp_path / "hub")
    for name in (
        ".git/config", "lora/a.safetensors", "transformer/mine.safetensors", "transformer/my.json", "notes.txt",
    ):  # fmt: skip
        mine = out / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("mine")
        with pytest.raises(SystemExit, match=r"contains files that no export wrote \(.*move them elsewhere"):
            main(trained.folder, out=out)
        assert mine.read_text() == "mine"
        mine.unlink()
        if mine.parent != out and not any(mine.parent.iterdir()):
            mine.parent.rmdir()
    replacing.check_export(out)


def test_replacing_touches_no_folder_of_another_name(exported: Path, tmp_path: Path):
    for name in ("hub.tmp", "hub.earlier.tmp", ".hub.export-elsewhere-1.new"):
        (tmp_path / name).mkdir()
    shutil.copytree(exported, tmp_path / "hub")
    replacing.check_export(tmp_path / "hub")
    with replacing.aside(tmp_path / "hub") as new:
        (new / "README.md").write_text("new")
    assert [f.name for f in (tmp_path / "hub").iterdir()] == ["README.md"]
    with pytest.raises(KeyError), replacing.aside(tmp_path / "hub") as new:
        raise KeyError("it failed")
    names = [".hub.export-elsewhere-1.new", "hub", "hub.earlier.tmp", "hub.tmp"]
    assert sorted(f.name for f in tmp_path.iterdir()) == names


@pytest.mark.parametrize("name", ["hub", "[v1] 50% #2?"])
def test_what_a_killed_export_left_is_removed_but_an_earlier_export_is_not(tmp_path: Path, name: str):
    out = tmp_path / name
    ended = subprocess.Popen(["true"])
    ended.wait()
    for what in ("new", "earlier"):
        (tmp_path / f".{name}.export-{socket.gethostname()}-{ended.pid}.{what}").mkdir()
    (tmp_path / f".{name}.export-{socket.gethostname()}-{ended.pid}.earlier" / "README.md").write_text("earlier")
    with pytest.raises(KeyError), replacing.aside(out):
        raise KeyError("it failed")
    assert [str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.md")] == [f"{name}/README.md"]
    assert [f.name for f in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "mine",
    [
        {"manifest.json": '{"name": "an app"}'},
        {"manifest.json": "no JSON"},
        {"weights.safetensors": "mine"},
        {"manifest.json": '{"files": {"state/a": ""}}'},
    ],
)
def test_a_users_file_named_like_a_shipped_one_is_left_alone(tmp_path: Path, mine: dict[str, str]):
    for name, text in mine.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match="contains files that no export wrote"):
        replacing.check_shipped(tmp_path, tmp_path / "source")


def test_behind_a_link_the_target_is_replaced_and_the_link_stays(tmp_path: Path):
    (tmp_path / "disk" / "hub").mkdir(parents=True)
    (tmp_path / "hub").symlink_to(tmp_path / "disk" / "hub")
    with replacing.aside(tmp_path / "hub") as new:
        (new / "README.md").write_text("new")
    assert (tmp_path / "hub").is_symlink()
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")) == [
        "disk",
        "disk/hub",
        "disk/hub/README.md",
        "hub",
    ]


def test_a_folder_with_any_index_but_a_pipelines_is_none(tmp_path: Path):
    for text in ("[]", "no JSON", "{}"):
        (tmp_path / "model_index.json").write_text(text)
        assert not replacing.is_pipeline(tmp_path)


def test_where_the_new_export_cannot_take_the_name_the_earlier_one_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "README.md").write_text("earlier")
    real = os.replace

    def refuse(source: Path, target: Path) -> None:
        if str(source).endswith(".new"):
            raise OSError("no")
        real(source, target)

    monkeypatch.setattr(replacing.os, "replace", refuse)
    with pytest.raises(OSError, match="no"), replacing.aside(tmp_path / "hub") as new:
        (new / "README.md").write_text("new")
    assert (tmp_path / "hub" / "README.md").read_text() == "earlier"
    assert [f.name for f in tmp_path.iterdir()] == ["hub"]


def test_weights_are_shipped_into_no_folder_of_anything_else(trained: Trained, exported: Path, tmp_path: Path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "manifest.json").write_text("mine")
    (tmp_path / "mine" / "data.bin").write_text("mine")
    before = (trained.checkpoint / "manifest.json").read_bytes()
    for source, out in (
        (trained.checkpoint, trained.checkpoint), (trained.checkpoint, tmp_path / "mine"), (exported, exported)
    ):  # fmt: skip
        with pytest.raises(
            SystemExit, match=r"is the source itself|contains files that no export wrote|is among a stage's checkpoints"
        ):
            main(source, ship=out)
    assert (trained.checkpoint / "manifest.json").read_bytes() == before
    assert (tmp_path / "mine" / "manifest.json").read_text() == "mine"
    with pytest.raises(SystemExit, match="is among a stage's checkpoints"):
        main(trained.checkpoint, ship=trained.checkpoint.with_name("step_00000009"))
    for _ in range(2):  # an earlier one is replaced
        main(trained.checkpoint, ship=tmp_path / "shipped")
    with pytest.raises(SystemExit, match="is the source itself"):
        main(tmp_path / "shipped", ship=tmp_path / "shipped")


def test_a_source_without_a_checkpoint_is_refused(trained: Trained, tmp_path: Path):
    (tmp_path / "stage1").mkdir()
    shutil.copy(trained.folder / "stage2" / "config.yaml", tmp_path / "stage1")
    for source, words in ((tmp_path, "finished"), (tmp_path / "stage1", "has no checkpoint")):
        with pytest.raises(SystemExit, match=words):
            main(source, out=tmp_path / "export")
    with pytest.raises(SystemExit, match="one of --out DIR"):
        main(trained.folder)
