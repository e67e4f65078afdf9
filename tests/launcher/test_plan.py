"""A curriculum becomes the right chain of jobs."""

from pathlib import Path

import pytest

from launcher.job import Job
from launcher.plan import chain, stage_runs
from wemmu.config import Curriculum, dump, load_stage

RUN = Path("runs/x")


def curriculum(**changes: object) -> Curriculum:
    def stage(name: str, **more: object) -> dict[str, object]:
        common = {"resolution": 32, "steps": 30, "global_batch": 4, "trains": ["pathway"]}
        return {"name": name, **common, "optimizer": {"lr": 1e-3}, "mixture": {"t2i": 1.0}, **more}

    fields: dict[str, object] = {
        "name": "x",
        "backbones": {"vlm": "vlm", "sana": "sana"},
        "data": {"shards": "shards", "prepare": {"sources": [{"kind": "shapes", "samples": {"t2i": 8}}]}},
        "memory": {"micro_batch": 4, "reference_resolution": 32},
        "evaluation": {"prompts": 5},
        "stages": [stage("a"), stage("b", steps=70), stage("c", start="elsewhere"), stage("d")],
    }
    return Curriculum.model_validate(fields | changes)


def by_name(jobs: tuple[Job, ...]) -> dict[str, Job]:
    return {job.name: job for job in jobs}


def test_the_chain_is_data_then_each_stage_with_its_evaluation_then_export_and_report():
    stages = [job for stage in "abcd" for job in (stage, f"{stage}/evaluation")]
    assert [job.name for job in chain(curriculum(), RUN)] == ["data", *stages, "export", "report"]


def test_nothing_is_prepared_or_evaluated_that_was_not_asked_for():
    plain = curriculum(data={"shards": "shards"}, evaluation={"prompts": 0})
    assert [job.name for job in chain(plain, RUN)] == [*"abcd", "export", "report"]


def test_each_stage_starts_from_the_last_checkpoint_of_the_one_before_unless_told_otherwise():
    starts = [one.stage.start for one in stage_runs(curriculum(), RUN)]
    last_of_a, last_of_c = (RUN / stage / "checkpoints" / "step_00000030" for stage in "ac")
    assert starts == [None, last_of_a, Path("elsewhere"), last_of_c]


def test_a_stage_is_finished_by_the_very_file_the_next_one_starts_from():
    jobs = by_name(chain(curriculum(), RUN))
    runs = {one.stage.name: one for one in stage_runs(curriculum(), RUN)}
    assert jobs["a"].products == (runs["b"].stage.start / "manifest.json",)
    assert jobs["a/evaluation"].inputs == jobs["a"].products
    assert jobs["export"].inputs == jobs["d"].products


def test_the_report_is_made_again_after_anything_else():
    jobs = chain(curriculum(), RUN)
    assert set(jobs[-1].inputs) == {product for job in jobs[:-1] for product in job.products}


def test_a_stage_config_survives_its_file(tmp_path: Path):
    for one in stage_runs(curriculum(), RUN):
        dump(one, tmp_path / "config.yaml")
        assert load_stage(tmp_path / "config.yaml") == one


@pytest.mark.parametrize("name", ["export", "lock", "data", "report"])
def test_a_stage_cannot_take_a_name_of_the_run_folder(name: str):
    stages = [stage.model_dump() | {"name": name} for stage in curriculum().stages[:1]]
    with pytest.raises(ValueError, match=f"{name}.*taken: data, export"):
        chain(curriculum(stages=stages), RUN)
