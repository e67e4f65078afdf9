"""Checkpoints of many ranks: a failure is told on all, nothing is half there (engines: tests/parallel/test_layouts)."""

import shutil
from itertools import pairwise
from pathlib import Path
from random import Random

import pytest

from tests.checkpoints import differing, load_state, load_weights
from tests.parallel.ranks import RankError, on_ranks
from tests.training import saving
from tests.training.layouts import CARRIED, SHAPES, blank, canonical, differences, origin
from tests.training.runs import STAGE_RUN
from tests.training.saving import POINTS, STEP
from tests.training.test_checkpoint import flip_a_byte
from wemmu.checkpoint import retention, store
from wemmu.checkpoint.saver import Saver

WORLDS = (1, 2, 4)
NAME = store.directory_name(STEP)
# Of the rank itself, or as the others hear of it.
DEATH = "killed by SIGKILL|Connection (reset|closed) by peer"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder LAYOUT-WORLD for each layout on each number of ranks; each has one checkpoint of the same state."""
    root = tmp_path_factory.mktemp("saved")
    for world in WORLDS:
        on_ranks(world, saving.save_all, root)
    return root


def test_one_process_reads_whole_weights_whoever_saved_them(saved: Path):
    expected = canonical(STEP).weights | CARRIED
    for folder in saved.iterdir():
        weights, manifest = load_weights(folder / NAME)
        assert differing(weights, expected) == [], folder
        assert manifest.tensors == {name: list(weight.shape) for name, weight in expected.items()}
        assert manifest.trained == sorted(SHAPES)
        assert manifest.layout == {"engine": folder.name.split("-")[0]}


def test_every_rank_writes_a_part_and_replicas_are_written_once(saved: Path):
    def size(folder: str) -> list[int]:
        return [file.stat().st_size for file in sorted((saved / folder / NAME / "state").glob("*.distcp"))]

    assert len(size("single-4")) == len(size("zero3-4")) == 4
    assert min(size("zero3-4")) > 0
    # An archive for each tensor, on whichever rank.
    assert sum(size("single-4")) == sum(size("single-1"))


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, str]]]:
    root = tmp_path_factory.mktemp("refused")
    return root, on_ranks(2, saving.refusals, root)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (
            "lacks",
            "it lacks ema.bridge.more, exp_avg.bridge.more, exp_avg_sq.bridge.more and 1 more and holds",
        ),
        (
            "unknown",
            "and holds unknown ema.dit.to_out.bias, exp_avg.dit.to_out.bias, exp_avg_sq.dit.to_out.bias",
        ),
        ("shape", "model.dit.to_out.bias has shape [7], not [8]"),
        ("hole", "exp_avg.dit.qk.weight invalid fill tensor-volume: 30 chunks-volume: 15"),
        ("steps", "the ranks are at different steps: [0, 1]"),
        ("infinite", "step_00000004 was not written: not finite are exp_avg_sq.dit.qk.weight"),
        ("busy", "is being trained in by another process (pid 1 on another)"),
        ("full disk", "was not written: rank 1: "),
    ],
)
def test_what_cannot_be_is_refused_by_name_on_all_ranks(refused, case: str, why: str):
    for said in refused[1]:
        assert why in said[case]


def test_after_a_refusal_only_what_is_whole_bears_a_name(refused):
    root = refused[0] / "bad"
    assert retention.latest(root) == root / NAME
    assert [d.name for d in root.iterdir()] == [NAME]


def test_damage_to_any_file_is_told_on_all_ranks_by_its_name(saved: Path, tmp_path: Path):
    files = sorted((saved / "fsdp-2" / NAME / "state").iterdir())
    assert [file.name for file in files] == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    copies = [tmp_path / str(number) for number in range(2 * len(files))]
    for number, copy in enumerate(copies):
        shutil.copytree(saved / "fsdp-2", copy)
        file = copy / NAME / "state" / files[number // 2].name
        if number % 2:
            file.unlink()
        else:
            flip_a_byte(file)
    for said in on_ranks(2, saving.load_damaged, copies):
        for number, message in enumerate(said):
            kind = "missing" if number % 2 else "damaged"
            assert f"{NAME}: the file state/{files[number // 2].name} is {kind}" in message


def test_all_ranks_pass_over_a_damaged_checkpoint_and_hash_every_file_once(saved: Path, tmp_path: Path):
    shutil.copytree(saved / "zero3-4", tmp_path / "run")
    damaged = tmp_path / "run" / store.directory_name(STEP + 1)
    shutil.copytree(tmp_path / "run" / NAME, damaged)
    (damaged / "manifest.json").write_text("{}")
    ranks = on_ranks(2, saving.load_newest_whole, tmp_path / "run")
    assert [(step, wrong) for step, wrong, _ in ranks] == [(STEP, [])] * 2
    hashed = sorted(file for *_, files in ranks for file in files)
    assert hashed == sorted((tmp_path / "run" / NAME / "state").iterdir())


def test_all_ranks_refuse_to_resume_if_one_has_another_backbone(tmp_path: Path):
    told = on_ranks(2, saving.resume_beside_another_vlm, STAGE_RUN)
    assert told[0] == told[1]
    assert "step_00000002 cannot be resumed from: it was trained with another vlm" in told[0]


def test_training_goes_on_while_the_state_of_the_moment_is_written(tmp_path: Path):
    for said in on_ranks(2, saving.save_while_training, tmp_path):
        assert said["sum"] == 2 * 20 * 4
        names = [store.directory_name(step) for step in range(1, 5)]
        # While the disk is stuck, there are only those of before; the newest two stay.
        assert said["seen"] == [[], names[:1], names[:2], names[1:3]]
        assert said["left"] == names[2:]
    for step in (3, 4):
        state = canonical(0)
        load_state(tmp_path / store.directory_name(step), state)
        assert differences(state, canonical(step)) == []


def test_a_failure_in_the_background_is_raised_by_the_next_call_on_all_ranks(tmp_path: Path):
    said = on_ranks(2, saving.fail_in_the_background, tmp_path)
    assert said[0] == said[1]
    assert len(said[0]) == 1
    assert "step_00000001 was not written: rank 1: " in said[0][0]
    # And the one after it is whole.
    assert retention.latest(tmp_path) == tmp_path / store.directory_name(1)


def whole_step(root: Path) -> int:
    """The step that a run would go on from; its state must be that of the step, and a new start leaves no debris."""
    state = blank(canonical(0))
    manifest = store.load_newest(root, state)
    if manifest is not None:
        assert differences(state, canonical(manifest.step)) == []
    Saver(root, 1, origin()).close()
    assert [d.name for d in root.glob("*.tmp")] == []
    return manifest.step if manifest else 0


# The other ranks have no part in what comes after the hashes.
KILLS = [(point, world, None) for point in POINTS for world in (1, 2)]
KILLS += [(point, 2, 1) for point in list(POINTS)[: list(POINTS).index("files are being hashed") + 1]]


@pytest.mark.slow
@pytest.mark.parametrize(("point", "world", "victim"), KILLS)
def test_a_kill_at_any_point_leaves_the_old_state_or_the_new(
    tmp_path: Path, point: str, world: int, victim: int | None
):
    with pytest.raises(RankError, match=DEATH):
        on_ranks(world, saving.killed, tmp_path, point, victim)
    new = point in ("the name is given", "an older one is about to go", "an older one is half removed")
    assert whole_step(tmp_path) == (2 if new else 1)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_kills_at_random_moments_leave_a_whole_state_to_go_on_from(tmp_path: Path, world: int):
    random, reached = Random(world), [0]
    for _ in range(6):
        with pytest.raises(RankError, match=DEATH):
            on_ranks(world, saving.save_until_killed, tmp_path, random.uniform(0, 4))
        reached.append(whole_step(tmp_path))
    # Each start saves one whole, and what is whole is never lost.
    assert all(now > before for before, now in pairwise(reached))
