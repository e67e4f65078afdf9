"""A run folder belongs to one curriculum, and what is missing is said before anything starts."""

from pathlib import Path

import pytest

from launcher import folder
from tests.launcher.test_plan import curriculum, rising, written
from wemmu.config import Curriculum, load_curriculum, load_stage
from wemmu.config.schema import Parallel
from wemmu.diagnosis.preflight import inputs


@pytest.fixture
def runnable(tmp_path: Path) -> Curriculum:
    (tmp_path / "backbone").mkdir()
    return curriculum(
        backbones=dict.fromkeys(("vlm", "vae", "dit"), tmp_path / "backbone"),
        stages=[stage.model_dump() | {"start": None} for stage in curriculum().stages],
    )


def everything_in(place: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}


def test_what_is_written_reads_back_equal_and_may_go_on(runnable: Curriculum, tmp_path: Path):
    run = written(runnable, tmp_path / "run")
    assert load_curriculum(run / "curriculum.yaml") == runnable
    assert load_stage(run / "b" / "config.yaml").stage.start == run / "a" / "checkpoints" / "step_00000030"
    folder.check(runnable, run)


def test_another_curriculum_is_refused_with_the_fields_that_differ(runnable: Curriculum, tmp_path: Path):
    run = written(runnable, tmp_path / "run")
    before = everything_in(run)
    stages = list(runnable.stages)
    stages[1] = stages[1].model_copy(update={"steps": 71})
    other = runnable.model_copy(update={"seed": 5, "stages": tuple(stages)})
    with pytest.raises(folder.RefusedError) as refusal:
        folder.check(other, run)
    message = str(refusal.value)
    assert "  seed: 0 -> 5\n  stages.b.steps: 70 -> 71\n" in message
    assert "--run" in message
    assert "delete" in message
    assert everything_in(run) == before


def test_a_run_may_go_on_in_another_layout(runnable: Curriculum, tmp_path: Path):
    """Checkpoints fit every layout, and the samples of a step do not depend on it."""
    run = written(runnable, tmp_path / "run")
    memory = runnable.memory.model_copy(update={"micro_batch": 1, "checkpointing": True})
    moved = runnable.model_copy(update={"parallel": Parallel(engine="zero3", ranks=2), "memory": memory, "threads": 1})
    folder.check(moved, run)
    folder.write(moved, run)
    assert load_stage(run / "b" / "config.yaml").parallel.ranks == 2


def test_stages_in_another_order_are_another_curriculum(runnable: Curriculum):
    turned = runnable.model_copy(update={"stages": runnable.stages[::-1]})
    assert list(folder.changes(runnable, turned)) == ["  order of stages: ['a', 'b', 'c', 'd'] -> ['d', 'c', 'b', 'a']"]


def test_a_folder_of_something_else_is_refused(runnable: Curriculum, tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(folder.RefusedError, match="not a run folder"):
        folder.check(runnable, tmp_path / "home")
    with pytest.raises(folder.RefusedError, match="s3:/bucket/run is a URL"):
        folder.check(runnable, Path("s3://bucket/run"))


def test_a_folder_in_which_the_first_launcher_died_early_is_free(runnable: Curriculum, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "lock").write_text("12")
    for left in ("curriculum.yaml.123.tmp", "curriculum.yaml.tmp"):
        (run / left).write_text("na")
    folder.check(runnable, run)


def test_every_missing_path_is_named_at_once():
    wanted = curriculum(
        data={"shards": "no/shards"}, sampling={"prompts": [{"images": ["no.png"]}]},
        evaluation={"benchmarks": {"unified_bench": {"data": "no/photos", "encoders": {"clip": "no/clip"}}}},
    )  # fmt: skip
    with pytest.raises(folder.RefusedError) as refusal:
        folder.refuse_problems(wanted, inputs(wanted))
    for named in (
        "vlm is not a directory",
        "sana/transformer is not a directory",
        "sana/vae is not a directory",
        "stages.c.start: elsewhere",
        "no/shards",
        "no such image: no.png",
        "evaluation.benchmarks.unified_bench.data: no/photos",
        "evaluation.benchmarks.unified_bench.encoders.clip: no/clip",
    ):
        assert named in str(refusal.value)


def test_one_folder_has_one_spelling(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert folder.normalise(tmp_path / "runs" / "x") == folder.normalise(Path("./runs/y/../x")) == Path("runs/x")
    assert folder.normalise(Path("/elsewhere/x")) == Path("/elsewhere/x")
    # In a command it would be an option.
    assert folder.normalise(Path("./-x")) == tmp_path / "-x"


def test_a_stage_with_several_resolutions_has_a_config_for_each_and_is_known_by_the_last(tmp_path: Path):
    folder.write(rising(), tmp_path)
    names = [load_stage(tmp_path / "b" / f"config-{px}.yaml") for px in (32, 48, 64)]
    assert [one.stage.resolution for one in names] == [32, 48, 64]
    assert load_stage(tmp_path / "b" / "config.yaml") == names[-1]
    assert load_curriculum(tmp_path / "curriculum.yaml") == rising()
