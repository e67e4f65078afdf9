"""The evaluation of a stage: the benchmark `shapes` with all tasks, and the file that gates and reports read.

STAGE/evaluation/      the benchmark's folder; samples.json lists the first requests of each task and split
STAGE/evaluation.json  shares by task, split and group
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from wemmu.config.benchmarks import EVALUATION, RESULTS, SAMPLES, ShapesOptions
from wemmu.config.files import replace_text, replacing
from wemmu.config.schema import StageRun
from wemmu.config.task import Task
from wemmu.evaluation.benchmark import Mark
from wemmu.evaluation.card import read_card
from wemmu.evaluation.generation import IMAGES, INPUTS, Draw, load
from wemmu.evaluation.run_benchmark import Only, run_benchmark
from wemmu.evaluation.scores import HEADLINE, seen, summarize
from wemmu.evaluation.shapes.benchmark import Shapes, category_of
from wemmu.shapes.render import render

FORMAT = 1
TARGETS = "targets"
# Number of requests per task and split that the report shows: always the first ones.
KEPT = 8


def options_of(run: StageRun, prompts: int) -> ShapesOptions:
    """Return the options of a stage's evaluation: all of its tasks and splits."""
    return ShapesOptions(
        prompts=prompts,
        tasks=tuple(task for task in Task if task in run.stage.mixture),
        splits=("test", "composition"),
        seed=run.sampling.seed,
        batch=run.evaluation.batch,
    )


def evaluate(
    run: StageRun,
    prompts: int,
    folder: Path,
    open_model: Callable[[], Draw],
    settings: Mapping[str, Any],
    only: Only | None = None,
) -> dict[str, Any] | None:
    """Score a model on held-out requests; return what is written to `folder`/evaluation.json.

    Return None if this process only generates. Parameters as `run_benchmark`; what an earlier checkpoint generated is
    deleted.
    """
    options, home = options_of(run, prompts), folder / EVALUATION
    if run_benchmark("shapes", options, run, home, open_model, settings, only, replace=True) is None:
        return None
    shapes, parts = Shapes(options, run), dict[tuple[Task, str], list[Mark]]()
    for mark in read_card(home)[1]:
        ask = shapes.held_out[mark.key]
        parts.setdefault((ask.task, ask.split), []).append(mark)
    tasks: dict[str, dict[str, Any]] = {}
    for (task, split), marks in parts.items():
        asks = [shapes.held_out[mark.key] for mark in marks]
        tasks.setdefault(task, {})[split] = summarize(asks, [_outcomes(mark) for mark in marks])
    replace_text(home / SAMPLES, json.dumps(_samples(shapes, parts.values(), home), indent=1))
    facts = {"format": FORMAT, "stage": run.stage.name, "prompts": prompts, "resolution": run.stage.resolution}
    model = {name: settings["model"].get(name) for name in ("stage", "step", "ema")}
    results = {**facts, "seed": options.seed, "checkpoint": model, **settings["sampling"], "tasks": tasks}
    replace_text(folder / RESULTS, json.dumps(results, indent=1))
    return results


def lines(results: Mapping[str, Any]) -> Iterator[str]:
    """Yield a line for each task and split: the share of correct answers with its 95 % interval."""
    for task, splits in results["tasks"].items():
        for split, found in splits.items():
            share = found["measures"][HEADLINE[Task(task)]]
            yield (
                f"{category_of(task, split):30} {share['share']:6.1%}  [{share['low']:.1%}, {share['high']:.1%}]  "
                f"{share['successes']} of {share['count']}"
            )


def _samples(shapes: Shapes, parts: Iterable[list[Mark]], home: Path) -> list[dict[str, Any]]:
    """Return the entries of samples.json; write the targets."""
    (home / TARGETS).mkdir(exist_ok=True)
    marks = {mark.key: _outcomes(mark) for part in parts for mark in part[:KEPT]}
    samples = []
    for request, image, words in load(home, [one for one in shapes.requests() if one.key in marks]):
        ask = shapes.held_out[request.key]
        files = {f"input{n}": f"{INPUTS}/{request.key}_{n}.png" for n in range(len(ask.sources))}
        if ask.target is not None and ask.task not in (Task.RECONSTRUCTION, Task.UNDERSTANDING, Task.CAPTION):
            files["target"] = f"{TARGETS}/{request.key}.png"
            with replacing(home / files["target"]) as aside:
                render(ask.target, shapes.px).save(aside, "PNG")
        samples.append(
            {
                "task": ask.task,
                "split": ask.split,
                "number": ask.number,
                "text": ask.text,
                "group": ask.group,
                "right": next(iter(marks[request.key].values())),
                "marks": marks[request.key],
                "seen": seen(image),
                "words": words,
                "images": files | {"output": f"{IMAGES}/{request.key}.png"},
            }
        )
    return samples


def _outcomes(mark: Mark) -> dict[str, bool]:
    return {name: bool(value) for name, value in mark.values.items()}
