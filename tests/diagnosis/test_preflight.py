"""What is told of a curriculum before anything of it is submitted."""

from pathlib import Path

import pytest

from tests.data.handmade import MIXTURE, make_curriculum, shapes, stream, write
from wemmu.config import Curriculum, load_curriculum
from wemmu.config.shards import ShardError
from wemmu.config.task import Task
from wemmu.data.streams import open_held_out, open_streams
from wemmu.diagnosis import preflight


def test_the_data_set_must_have_every_resolution_of_a_stage(tmp_path: Path):
    px = (32, 48)
    streams = {stream(Task.T2I, s, s).model_copy(update={"resolution": s}): shapes(Task.T2I, 3, (s, s)) for s in px}
    write(tmp_path, streams)

    def checked(*resolutions: int) -> tuple[str, str]:
        several = {"resolution": resolutions, "next_resolution": {"samples": 8}, "mixture": {"t2i": 1.0}}
        base = make_curriculum(tmp_path).model_dump()
        base["stages"] = [base["stages"][0] | several]
        found = preflight.data(Curriculum.model_validate(base))
        return found.status, found.found

    assert checked(32, 48)[0] == "ok"
    status, found = checked(32, 48, 64)
    assert (status, "t2i at 64 px" in found, "32 px" in found) == ("problem", True, False)


@pytest.mark.parametrize(
    "have", [(Task.T2I, Task.EDIT, Task.MULTI_EDIT), (Task.EDIT, Task.RECONSTRUCTION), (Task.T2I,)]
)
def test_what_is_said_of_a_data_set_is_what_the_loader_does(tmp_path: Path, have: tuple[Task, ...]):
    write(tmp_path, {stream(task): shapes(task, 3) for task in have})
    for task in map(Task, MIXTURE):
        curriculum = make_curriculum(tmp_path, mixture={task: 1.0})
        found = preflight.data(curriculum)
        if found.status == "ok":
            assert open_streams(curriculum.data, [task], 32)
            continue
        with pytest.raises(ShardError) as refusal:
            open_streams(curriculum.data, [task], 32)
        # The same sentence, and the stage that mixes it.
        assert found.found == str(refusal.value).replace(f"{task} at", f"only: {task} at")


def test_a_data_set_without_records_of_its_own_for_reconstruction_can_be_read(tmp_path: Path):
    """Real sources have none: the images of text-to-image records serve."""
    write(tmp_path, {stream(task): shapes(task, 3) for task in (Task.T2I, Task.EDIT, Task.MULTI_EDIT)})
    assert preflight.data(make_curriculum(tmp_path)).status == "ok"


def test_a_stage_that_is_validated_needs_enough_records_to_hold_some_out(tmp_path: Path):
    write(
        tmp_path,
        {
            stream(Task.T2I, s, s).model_copy(update={"resolution": s}): shapes(Task.T2I, n, (s, s))
            for s, n in ((32, 9), (48, 3))
        },
    )
    plateau = {"samples": 80, "plateau": {"every": 1, "window": 1, "min_gain": 0.1, "patience": 1}}
    base = make_curriculum(tmp_path, mixture={"t2i": 1.0}).model_dump(mode="json")
    base["stages"][0] |= {"resolution": (32, 48), "next_resolution": plateau}
    base["data"]["validation"] = 2
    curriculum = Curriculum.model_validate(base)
    found = preflight.data(curriculum)
    assert (found.status, "t2i at 48 px, 4 records or more" in found.found, "t2i at 32" in found.found) == (
        "problem",
        True,
        False,
    )
    open_held_out(curriculum.data, [Task.T2I], 32)
    with pytest.raises(ShardError):
        open_held_out(curriculum.data, [Task.T2I], 48)


def test_a_record_of_a_data_set_that_cannot_be_read_is_told_though_it_could_be_written(tmp_path: Path):
    (tmp_path / "dataset.json").write_text("{")
    base = make_curriculum(tmp_path).model_dump()
    base["data"]["prepare"] = {"sources": [{"kind": "shapes", "samples": dict.fromkeys(MIXTURE, 3)}]}
    found = preflight.data(Curriculum.model_validate(base))
    assert (found.status, "dataset.json is not of this version" in found.found) == ("problem", True)


def test_a_source_is_looked_for_as_the_data_job_does(tmp_path: Path):
    """A name with brackets as it stands; and one that is not there is one problem, not two."""

    def checked(path: str) -> tuple[str, str]:
        base = make_curriculum(tmp_path / "shards").model_dump(mode="json")
        base["data"]["prepare"] = {"sources": [{"kind": "webdataset", "name": "web", "path": path}]}
        base["stages"][0]["mixture"] = {"t2i": 1.0}
        found = preflight.data(Curriculum.model_validate(base))
        return found.status, found.found

    (tmp_path / "cats [1].tar").touch()
    assert checked(f"{tmp_path}/cats [1].tar")[0] == "ok"
    (tmp_path / "set [v1]").mkdir()
    for name in ("000.tar", "001.tar"):
        (tmp_path / "set [v1]" / name).touch()
    for pattern in ("*.tar", "{000..001}.tar", "{000,001}.tar"):
        assert checked(f"{tmp_path}/set [v1]/{pattern}")[0] == "ok", pattern
    assert "/002.tar" in checked(f"{tmp_path}/set [v1]/{{000..002}}.tar")[1]
    assert "a directory instead of files: web" in checked(f"{tmp_path}/set [v1]")[1]
    status, found = checked(f"{tmp_path}/dogs.tar")
    assert (status, "nothing matches the path of web" in found, "record" in found) == ("problem", True, False)


@pytest.mark.parametrize("damage", ["a shard is gone", "a shard is cut", "an index is gone", "an index is changed"])
def test_files_that_the_loader_would_miss_are_told_before(tmp_path: Path, damage: str):
    write(tmp_path, {stream(task): shapes(task, 9) for task in (Task.T2I, Task.EDIT)})
    curriculum = make_curriculum(tmp_path, mixture={"t2i": 1.0})
    shard, index = sorted((tmp_path / "t2i").rglob("*.mds"))[-1], *(tmp_path / "t2i").rglob("index.json")
    match damage:
        case "a shard is gone":
            shard.unlink()
        case "a shard is cut":
            shard.write_bytes(shard.read_bytes()[:-1])
        case "an index is gone":
            index.unlink()
        case "an index is changed":
            index.write_bytes(index.read_bytes() + b" ")
    found = preflight.data(curriculum)
    with pytest.raises(ShardError) as refusal:
        open_streams(curriculum.data, [Task.T2I], 32)
    assert (found.status, found.found) == ("problem", str(refusal.value))
    # What no stage reads may be as it likes.
    assert preflight.data(make_curriculum(tmp_path, mixture={"edit": 1.0})).status == "ok"
    skips = make_curriculum(tmp_path, mixture={"t2i": 1.0}, damaged="skip")
    assert (preflight.data(skips).status == "ok") == ("shard" in damage)


# ------------------------------------------------------------------------------------------- options that nothing uses
CONFIGS = Path(__file__).parents[2] / "configs" / "shapes"
TEXT = "stages.stage1.mixture={t2i: 1.0}"
FLOW = "stages.stage1.objective={kind: flow, %s}"
CAPTION = "stages.reward.objective={kind: caption}"


def options(name: str, stage: str, *overrides: str):
    curriculum = load_curriculum(CONFIGS / f"{name}.yaml", overrides)
    only = tuple(one for one in curriculum.stages if one.name == stage)
    return preflight.unused_options(curriculum.model_copy(update={"stages": only}))


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (
            (TEXT, "recipe.bridge.reconstruct_without_vae=0.5"),
            "recipe.bridge.reconstruct_without_vae changes nothing, because no stage mixes the task reconstruction",
        ),
        (
            (TEXT, "recipe.bridge.source_latents=true"),
            "bridge.source_latents changes nothing, because no stage mixes an",
        ),
        (("recipe.bridge.queries.number=3",), "bridge.queries.number changes nothing, because the design is noisy"),
        (
            ("recipe.bridge.states.combine=route",),
            "bridge.states.combine changes nothing, because bridge.states.layers",
        ),
        ((FLOW % "weight: 0.2",), "stages.stage1.objective.weight changes nothing, because the kind is flow"),
        (
            (FLOW % "time: {kind: uniform, std: 2.0}",),
            "objective.time.std changes nothing, because time.kind is uniform",
        ),
        ((FLOW % "weighting: {gamma: 2.0}",), "objective.weighting.gamma changes nothing, because weighting.kind is"),
    ],
)
def test_an_option_that_no_stage_uses_is_named(overrides: tuple[str, ...], told: str):
    found = options("curriculum", "stage1", *overrides)
    assert found.status == "warning"
    assert told in found.words


def test_an_option_that_a_stage_uses_is_not_named():
    few = ("stages.stage1.mixture={reconstruction: 0.5, edit: 0.5}", FLOW % "weighting: {kind: min_snr, gamma: 2.0}")
    bridge = "recipe.bridge={reconstruct_without_vae: 0.5, source_latents: true, states: {layers: 2, combine: route}}"
    assert options("curriculum", "stage1", *few, bridge).status == "ok"
    # The start may have been trained with the wider DiT.
    wide = ("recipe.bridge.source_latents=true", "stages.stage1.start=elsewhere")
    assert options("curriculum", "stage1", TEXT, *wide).status == "ok"
    # Learnable queries begin with it.
    queries = ("recipe.bridge.queries={design: learnable_dynamic, std: 0.02}", "stages.*.trains=[pathway, queries]")
    assert options("curriculum", "stage1", *queries).status == "ok"


def test_rewards_that_no_stage_learns_from_are_named():
    control = "recipe.reward.control=constant"
    found = options("uae", "reward", CAPTION, control)
    assert "recipe.reward.held_out changes nothing, because no stage learns from rewards" in found.words
    assert "recipe.reward.control changes nothing" in found.words
    assert options("uae", "reward", control).status == "ok"


@pytest.mark.parametrize("name", ["curriculum", "demo", "ross", "uae", "uae-three-stage"])
def test_the_shipped_curricula_have_none(name: str):
    assert preflight.unused_options(load_curriculum(CONFIGS / f"{name}.yaml")).status == "ok"
