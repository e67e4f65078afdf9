"""What lies in `checkpoints/` beside the run's own is never used and never touched; one rule serves all who look."""

import shutil
from pathlib import Path

import pytest

from launcher.job import Job, last_step
from tests.training.test_checkpoint import files_of, make_state, other_state, save, truncate
from wemmu.checkpoint import retention, store
from wemmu.checkpoint.collective import CheckpointError
from wemmu.checkpoint.manifest import Origin, verify
from wemmu.checkpoint.saver import Saver
from wemmu.config.checkpoints import RenamedError, own_checkpoints


def beside(root: Path, earlier: Path) -> list[Path]:
    """What users put there: copies, links, an archive, a checkpoint moved to another disk with a link in its place."""
    shutil.copytree(earlier, root / "step_00000004_keep")
    shutil.copytree(earlier, root / "step_best_copy")
    shutil.copytree(earlier, root / "step_00000004.tmp.mine")
    (root / "step_best").symlink_to(earlier.name)
    (root / "step_00000005").symlink_to(root / "step_00000004_keep")
    (root / "step_00000009").write_text("an archive")
    (root / "step_00000006.tar.gz").write_text("an archive")
    (root / "step_best.tmp").mkdir()
    return [path for path in root.iterdir() if path.name not in ("step_00000004", "step_00000006")]


def test_what_a_user_puts_beside_checkpoints_is_never_used_and_never_touched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    root = tmp_path / "checkpoints"
    earlier, newest = save(root, 4), save(root, 6)
    theirs = beside(root, earlier)
    assert own_checkpoints(root) == [earlier, newest]
    assert retention.latest(root) == newest
    assert store.load_newest(root, other_state()).step == 6
    assert (
        f"skipping {root / 'step_00000005'}: it is a link to {root / 'step_00000004_keep'}" in capsys.readouterr().out
    )
    assert last_step(Job("stage1", (), tmp_path / "log", steps=12)) == 6
    retention.clear_debris(root)
    for step in (8, 10):
        save(root, step)
        retention.prune(root, keep=2)
    assert [path.name for path in own_checkpoints(root)] == ["step_00000008", "step_00000010"]
    assert not earlier.exists()
    assert all(path.is_symlink() or path.exists() for path in theirs)
    verify(root / "step_00000004_keep")


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_link_or_file_where_a_checkpoint_must_be_written_gives_way_and_nothing_is_lost(tmp_path: Path, kind: str):
    elsewhere = save(tmp_path / "elsewhere", 4)
    (tmp_path / "run").mkdir()
    place = tmp_path / "run" / "step_00000006"
    place.symlink_to(elsewhere) if kind == "link" else place.write_text("a file")
    assert save(tmp_path / "run", 6) == place
    verify(place)
    verify(elsewhere)
    assert kind == "link" or (place.parent / "step_00000006.other-1").read_text() == "a file"


def test_a_renamed_checkpoint_is_refused_by_name_and_what_it_holds_is_kept(tmp_path: Path):
    renamed = save(tmp_path, 4).rename(tmp_path / "step_00000006")
    for use in (retention.latest, lambda root: store.load_newest(root, other_state())):
        with pytest.raises(RenamedError, match=r"step_00000006 holds the checkpoint of step 4.*step_00000004"):
            use(tmp_path)
    save(tmp_path, 6)
    assert (tmp_path / "step_00000006.other-1" / "manifest.json").is_file()
    assert retention.latest(tmp_path) == renamed


def test_a_checkpoint_that_cannot_be_removed_stays_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    directories = [save(tmp_path, step) for step in (1, 2, 3)]

    def refuse(*_: object) -> None:
        raise PermissionError("not yours")

    monkeypatch.setattr(retention.os, "replace", refuse)
    retention.prune(tmp_path, keep=1)
    monkeypatch.undo()
    assert f"{directories[0]} cannot be removed and stays: not yours" in capsys.readouterr().out
    assert own_checkpoints(tmp_path) == directories


def test_where_no_checkpoint_is_whole_training_does_not_begin_at_step_0(tmp_path: Path):
    for step in (2, 3):
        truncate(files_of(save(tmp_path, step))[0])
    with pytest.raises(CheckpointError, match=r"step_00000002, step_00000003.*start the stage again, move"):
        store.load_newest(tmp_path, other_state())


def test_a_damaged_or_foreign_directory_of_a_later_step_does_not_end_training(tmp_path: Path):
    root = tmp_path / "checkpoints"
    save(root, 4)
    truncate(files_of(save(root, 12))[0])
    (root / "step_00000099").mkdir()
    assert store.load_newest(root, other_state()).step == 4
    saver = Saver(root, 1, Origin("stage1", 0, 32, {}))
    saver.save(make_state(6), {})
    saver.close()
    assert [path.name for path in own_checkpoints(root)] == ["step_00000006", "step_00000012", "step_00000099"]
