"""A curriculum becomes the right chain of jobs."""

import json
from pathlib import Path

import pytest

from launcher import folder
from launcher.job import Job, checkpoint, is_finished, missing
from launcher.plan import chain, find, stage_runs
from wemmu.config import Curriculum, dump, load_stage
from wemmu.config.benchmarks import FidelityOptions

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


def written(made: Curriculum, run: Path) -> Path:
    """Return the folder `run` as a launcher leaves it before the first job."""
    run.mkdir(parents=True)
    folder.write(made, run)
    return run


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


def rising(**changes: object) -> Curriculum:
    """Stage b has three resolutions: steps 0 to 10, 20 and 70."""
    stages = [stage.model_dump(exclude_none=True) for stage in curriculum().stages]
    stages[1] |= {"resolution": [32, 48, 64], "next_resolution": {"samples": 40}}
    return curriculum(stages=stages, **changes)


def test_each_resolution_of_a_stage_is_its_own_job_in_the_folder_of_the_stage():
    jobs = chain(rising(), RUN)
    names = ["b@32", "b@48", "b@64"]
    assert [job.name for job in jobs][2:8] == ["a/evaluation", *names, "b/evaluation", "c"]
    assert [by_name(jobs)[name].after for name in [*names, "b/evaluation", "c"]] == [
        ("a",), ("b@32",), ("b@48",), ("b@64",), ("b@64",),
    ]  # fmt: skip
    assert {by_name(jobs)[name].folder for name in names} == {RUN / "b"}
    assert len({by_name(jobs)[name].log for name in names}) == 3
    # The gate of the stage before is asked once.
    assert [bool(by_name(jobs)[name].gate) for name in names] == [True, False, False]


def test_the_jobs_of_several_resolutions_read_one_stage_at_one_resolution_each():
    runs = [one for one in stage_runs(rising(), RUN) if one.stage.name == "b"]
    assert [one.stage.resolution for one in runs] == [32, 48, 64]
    assert [one.stage.span for one in runs] == [(0, 10), (10, 20), (20, 70)]
    assert {(one.stage.steps, one.stage.start) for one in runs} == {(70, RUN / "a" / "checkpoints" / "step_00000030")}
    commands = [by_name(chain(rising(), RUN))[one.stage.label].command[-1] for one in runs]
    assert commands == [str(RUN / "b" / f"config-{one.stage.resolution}.yaml") for one in runs]


def test_a_stage_after_several_resolutions_starts_from_the_last_checkpoint_of_the_last():
    stages = [stage for stage in rising().stages if stage.name != "c"]
    runs = {one.stage.label: one for one in stage_runs(curriculum(stages=stages), RUN)}
    assert runs["d"].stage.start == RUN / "b" / "checkpoints" / "step_00000070"


def ended(run: Path, resolution: int, step: int, saved: int | None = None) -> None:
    """The first resolution of b ended at `step`, and the newest checkpoint is of step `saved`."""
    manifest = checkpoint(run / "b", step if saved is None else saved) / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(f'{{"step": {step if saved is None else saved}}}')
    with (run / "b" / "resolutions.jsonl").open("a") as file:
        file.write(json.dumps({"resolution": resolution, "to_step": step}) + "\n")


def test_a_resolution_is_finished_by_its_line_in_the_record_and_its_checkpoint(tmp_path: Path):
    jobs = by_name(chain(rising(), tmp_path))
    names = [jobs[name] for name in ("b@32", "b@48", "b@64")]
    assert [is_finished(job) for job in names] == [False, False, False]
    ended(tmp_path, 32, 8)
    assert [is_finished(job) for job in names] == [True, False, False]
    assert find([*jobs.values()], "b").name == "b@48"
    ended(tmp_path, 48, 15)
    ended(tmp_path, 64, 70)
    assert [is_finished(job) for job in names] == [True, True, True]
    assert find([*jobs.values()], "b").name == "b@64"
    # As earlier versions called it.
    (tmp_path / "b" / "resolutions.jsonl").rename(tmp_path / "b" / "rungs.jsonl")
    earlier = by_name(chain(rising(), tmp_path))
    assert [is_finished(earlier[job.name]) for job in names] == [True, True, True]


def test_a_resolution_whose_last_checkpoint_is_gone_is_not_finished(tmp_path: Path):
    ended(tmp_path, 32, 8, saved=6)
    job = by_name(chain(rising(), tmp_path))["b@32"]
    assert not is_finished(job)
    assert missing(job) == (tmp_path / "b" / "resolutions.jsonl",)


@pytest.mark.parametrize("name", ["export", "lock", "data", "report"])
def test_a_stage_cannot_take_a_name_of_the_run_folder(name: str):
    stages = [stage.model_dump() | {"name": name} for stage in curriculum().stages[:1]]
    with pytest.raises(ValueError, match=f"{name}.*taken: data, export"):
        chain(curriculum(stages=stages), RUN)


def test_benchmarks_follow_a_stage_and_hold_up_the_next_one_only_for_its_gate():
    stages = [stage.model_dump(exclude_none=True) for stage in curriculum().stages]
    stages[0]["gate"] = {"benchmarks": [{"benchmark": "shapes", "at_least": 0.5}]}
    stages[1]["benchmarks"] = {}
    stages[3]["benchmarks"] = {"fidelity": {"shards": "others", "records": 4}}
    named = {"shapes": {"prompts": 3}, "dpg": {"data": "dpg", "judge": {"url": "http://here", "model": "m"}}}
    config = curriculum(evaluation={"prompts": 5, "benchmarks": named, "ranks": 2}, stages=stages)
    jobs = by_name(chain(config, RUN))
    scored = [name for name, job in jobs.items() if job.evaluates]
    after_c = ["c/evaluation", "c/shapes", "c/dpg", "d/evaluation", "d/fidelity"]
    assert scored == ["a/evaluation", "a/shapes", "a/dpg", "b/evaluation", *after_c]
    assert jobs["b"].after == ("a", "a/shapes")
    assert jobs["d"].after == ("c",)
    assert jobs["d/fidelity"].products == (RUN / "d/benchmarks/fidelity/card.json",)
    assert jobs["a/shapes"].inputs == jobs["a"].products
    assert (jobs["a/shapes"].ranks, jobs["a/evaluation"].ranks) == (2, 2)
    assert set(scored) < set(jobs["report"].after)
    # The options come back from the file of a stage.
    (last,) = [run for run in stage_runs(config, RUN) if run.stage.name == "d"]
    assert last.evaluation.after(last.stage) == {"fidelity": FidelityOptions(shards=Path("others"), records=4)}


@pytest.mark.parametrize(
    ("evaluation", "gate", "words"),
    [
        ({}, {"benchmark": "wise", "at_least": 0.5}, r"its gate reads wise, which does not run after it.*there: none"),
        ({"shapes": {}}, {"benchmark": "shapes"}, "needs at_least or at_most"),
        ({"shapes": {"prompt": 3}}, None, r"evaluation\.benchmarks\.shapes\.prompt"),
        ({"gen_eval": {}}, None, r"evaluation\.benchmarks\.gen_eval"),
        ({"fidelity": {}}, None, r"data\.validation is 0"),
    ],
)
def test_benchmarks_and_gates_that_cannot_be_are_refused(evaluation: dict, gate: dict | None, words: str):
    stages = [stage.model_dump(exclude_none=True) for stage in curriculum().stages]
    stages[0]["gate"] = {"benchmarks": [gate] if gate else []}
    with pytest.raises(ValueError, match=f"(?s){words}"):
        curriculum(evaluation={"benchmarks": evaluation}, stages=stages)
