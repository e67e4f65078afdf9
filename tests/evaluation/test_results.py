"""An evaluation with models that are known to be right, to copy, or to draw noise."""

import json
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.fakes import (
    Answer,
    Painter,
    any_scene,
    copied,
    drawing,
    mostly,
    noise,
    perfect,
    settings,
    stage_run,
)
from wemmu.config import Task
from wemmu.config.task import GENERATION_TASKS
from wemmu.evaluation.benchmark import BenchmarkRequest
from wemmu.evaluation.generation import in_batches, request_of
from wemmu.evaluation.requests import HeldOutRequest, held_out, splits
from wemmu.evaluation.run_record import read_samples
from wemmu.evaluation.scores import HEADLINE
from wemmu.evaluation.shapes.benchmark import Shapes
from wemmu.evaluation.shapes.results import KEPT, evaluate, options_of
from wemmu.recipes.ross.config import ReconstructiveTuning
from wemmu.sampling.request import Response
from wemmu.shapes.edits import EDITS
from wemmu.shapes.language import full_caption
from wemmu.shapes.render import render
from wemmu.shapes.scene import HELD_OUT

PROMPTS = 10


def scores(answer: Answer, folder: Path, stage: str = "stage4") -> dict[str, Any]:
    run = stage_run(stage)
    # The answer stands for the checkpoint.
    facts = settings(run, getattr(answer, "__name__", ""))
    results = evaluate(run, PROMPTS, folder, lambda: drawing(Painter(run, PROMPTS, answer), run), facts)
    assert results is not None
    return results


def share(results: dict[str, Any], task: str, split: str, measure: str) -> float:
    return results["tasks"][task][split]["measures"][measure]["share"]


def test_right_answers_score_one_everywhere(tmp_path: Path):
    results = scores(perfect, tmp_path)
    for task in GENERATION_TASKS:
        for split in splits(task):
            assert share(results, task, split, HEADLINE[task]) == 1.0, (task, split)
    for task in ("edit", "multi_edit"):
        assert share(results, task, "test", "followed") == share(results, task, "test", "preserved") == 1.0
        assert share(results, task, "test", "copied") == 0.0


def test_copying_the_input_is_the_collapse_and_nothing_else(tmp_path: Path):
    results = scores(copied, tmp_path)
    for task in ("edit", "multi_edit"):
        for split in ("test", "composition"):
            assert share(results, task, split, "copied") == share(results, task, split, "preserved") == 1.0
            assert share(results, task, split, "correct") == share(results, task, split, "followed") == 0.0
    # Copying is what reconstruction asks for.
    assert share(results, "reconstruction", "test", "same") == 1.0


def test_noise_scores_nothing(tmp_path: Path):
    results = scores(noise, tmp_path)
    measures = [m for task in results["tasks"].values() for part in task.values() for m in part["measures"].values()]
    assert len(measures) > 10
    assert all(measure["successes"] == 0 for measure in measures)


def test_only_tasks_of_the_stage_are_scored(tmp_path: Path):
    assert set(scores(perfect, tmp_path, "stage1")["tasks"]) == {"t2i", "reconstruction", "unconditional"}


def test_counts_breakdown_and_settings_are_recorded(tmp_path: Path):
    results = scores(mostly, tmp_path)
    edits, run = results["tasks"]["edit"], stage_run("stage4")
    assert edits["test"]["measures"]["correct"]["count"] == PROMPTS
    assert edits["composition"]["measures"]["correct"]["count"] == PROMPTS // 2
    assert set(edits["test"]["by"]) == set(EDITS)
    assert set(results["tasks"]["t2i"]["test"]["by"]) == {"1 object", "2 objects", "3 objects"}
    counts = [part["correct"]["count"] for part in edits["test"]["by"].values()]
    assert sum(counts) == PROMPTS
    assert results["solver"]["steps"] == run.sampling.steps
    assert results["guidance"]["t2i"] == {"unconditional": 1 - run.sampling.t2i, "full": run.sampling.t2i}
    json.dumps(results)


def test_first_images_are_kept_as_they_came_out(tmp_path: Path):
    scores(mostly, tmp_path)
    samples = json.loads((tmp_path / "evaluation" / "samples.json").read_text())
    kept = [s for s in samples if (s["task"], s["split"]) == ("multi_edit", "test")]
    assert [s["number"] for s in kept] == list(range(KEPT))
    # `mostly` copies every fourth time.
    assert [s["right"] for s in kept] == [True, True, True, False] * 2
    asks = list(islice(held_out(Task.MULTI_EDIT, "test", 0), KEPT))
    for ask, sample in zip(asks, kept, strict=True):
        drawn = {name: Image.open(tmp_path / "evaluation" / file) for name, file in sample["images"].items()}
        wanted = {"input0": ask.sources[0], "input1": ask.sources[1], "target": ask.target}
        wanted["output"] = ask.target if sample["right"] else ask.sources[0]
        for name, scene in wanted.items():
            assert np.array_equal(np.array(drawn[name]), np.array(render(scene, 64))), (name, sample)
        assert sample["text"] == ask.text


def test_evaluating_another_checkpoint_replaces_the_images_and_the_same_one_keeps_them(tmp_path: Path):
    def died(ask: HeldOutRequest, size: tuple[int, int]) -> Image.Image:
        raise KeyboardInterrupt

    scores(copied, tmp_path)
    results = scores(perfect, tmp_path)
    assert share(results, "edit", "test", "correct") == 1.0
    died.__name__ = "perfect"
    assert scores(died, tmp_path) == results
    with pytest.raises(KeyboardInterrupt):
        scores(died, tmp_path, "stage1")
    # What the report finds now.
    assert read_samples(tmp_path / "evaluation") == []
    assert not list(tmp_path.rglob("*.tmp*"))


@pytest.mark.parametrize("task", GENERATION_TASKS)
def test_requests_are_held_out_and_the_same_however_many_are_drawn(task: Task):
    for split in splits(task):
        few, many = (list(islice(held_out(task, split, 0), n)) for n in (10, 30))
        assert few == many[:10]
        assert len({ask.sample_id for ask in many}) == len(many)
        targets = [ask.target for ask in many if ask.target is not None]
        assert all(target.split == split for target in targets)
        if split == "composition":
            assert all({(o.color, o.shape) for o in target.objects} & HELD_OUT for target in targets)
        else:
            assert all(source.split == "test" for ask in many for source in ask.sources)


def test_another_seed_asks_something_else():
    one, other = (list(islice(held_out(Task.T2I, "test", seed), 20)) for seed in (0, 1))
    assert [a.text for a in one] != [a.text for a in other]


def test_batches_are_of_one_task_and_split_and_show_the_sources():
    run = stage_run("stage4")
    shapes = Shapes(options_of(run, 3), run)
    batches = in_batches(shapes.requests(), 2)
    for several in batches:
        assert len({(shapes.held_out[one.key].task, shapes.held_out[one.key].split) for one in several}) == 1
    by_task = {several[0].task: request_of(several, (64, 64)) for several in reversed(batches)}
    asks = list(islice(held_out(Task.MULTI_EDIT, "test", 0), 3))
    images = by_task[Task.MULTI_EDIT].images
    assert images.shape == (2, 2, 3, 64, 64)
    assert np.array_equal(images[1, 1].permute(1, 2, 0).numpy(), np.array(render(asks[1].sources[1], 64)))
    assert by_task[Task.T2I].images.shape == (2, 0, 3, 64, 64)


def test_what_is_said_and_what_is_restored_are_scored_apart(tmp_path: Path):
    """Every second answer is wrong, every third image is another."""
    run = stage_run("stage4")
    changed = {"mixture": {Task.UNDERSTANDING: 1.0}, "objective": ReconstructiveTuning(kind="reconstructive")}
    run = run.model_copy(update={"stage": run.stage.model_copy(update=changed)})

    asked = Shapes(options_of(run, 12), run).held_out

    def draw(requests: Sequence[BenchmarkRequest]) -> list[Response]:
        assert {request.task for request in requests} == {Task.UNDERSTANDING}
        asks = [asked[request.key] for request in requests]
        drawn = [render(ask.sources[0] if ask.number % 3 else any_scene(), 64) for ask in asks]
        words = [ask.answer + " not" * (ask.number % 2) for ask in asks]
        return [Response(*pair) for pair in zip(drawn, words, strict=True)]

    facts: dict[str, Any] = {"model": {}, "sampling": {}}
    evaluated = evaluate(run, 12, tmp_path, lambda: draw, facts)
    assert evaluated is not None
    results = evaluated["tasks"]["understanding"]["test"]
    assert results["measures"]["right"]["successes"] == 6
    assert results["measures"]["restored"]["successes"] == 8
    # Descriptions and questions take turns.
    assert [results["by"][kind]["right"]["share"] for kind in ("description", "question")] == [1.0, 0.0]
    kept = json.loads((tmp_path / "evaluation" / "samples.json").read_text())
    assert kept[0]["words"] == full_caption(next(held_out(Task.UNDERSTANDING, "test", run.sampling.seed)).sources[0])
    assert kept[0]["images"].keys() == {"input0", "output"}
