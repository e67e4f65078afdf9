"""Runs one evaluation: generates answers, scores them, and keeps the first images of each part."""

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from wemmu.config.files import replace_text
from wemmu.config.schema import StageRun
from wemmu.config.task import Task
from wemmu.evaluation.requests import HeldOutRequest, batch, held_out, splits
from wemmu.evaluation.scores import HEADLINE, judge, seen, summarize
from wemmu.sampling.request import GenerationRequest, Response
from wemmu.shapes.render import render

# Answers the requests of a batch, in order.
Respond = Callable[[GenerationRequest], list[Response]]
FORMAT = 1
RESULTS_FILE = "evaluation.json"
IMAGES = "evaluation"
SAMPLES_FILE = "samples.json"
# Number of requests per task and split whose images are kept: always the first ones.
KEPT = 8


@dataclass(frozen=True)
class EvalSplit:
    """The requests of one task and split."""

    task: Task
    split: str
    asks: list[HeldOutRequest]


class _Progress:
    """Prints a line after each batch: what was scored, the result, and the remaining time."""

    def __init__(self, stage: str, total: int):
        self.stage, self.total, self.done, self._started = stage, total, 0, time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def say(self, part: EvalSplit, marks: list[dict[str, bool]], new: int) -> None:
        self.done += new
        measure = HEADLINE[part.task]
        right = sum(m[measure] for m in marks) / len(marks)
        minutes, seconds = divmod(round(self.seconds / self.done * (self.total - self.done)), 60)
        print(
            f"{self.stage}  {part.task}, {part.split}  {len(marks)}/{len(part.asks)}  {measure} {right:.1%}  "
            f"{minutes}:{seconds:02d} left",
            flush=True,
        )


def plan(run: StageRun, prompts: int) -> list[EvalSplit]:
    """Return the requests for a stage: every task of its mixture, `prompts` test scenes and half as many compositions.

    Raises:
        ValueError: if `prompts` is not positive.
    """
    if prompts <= 0:
        raise ValueError(f"the number of prompts is {prompts}; valid choices: any positive number")
    counts = {"test": prompts, "composition": -(-prompts // 2)}
    return [
        EvalSplit(task, split, list(islice(held_out(task, split, run.sampling.seed), counts[split])))
        for task in Task
        if task in run.stage.mixture
        for split in splits(task)
    ]


def evaluate(respond: Respond, sampling: dict[str, Any], run: StageRun, prompts: int, folder: Path) -> dict[str, Any]:
    """Score a model on held-out requests and keep the first images of each part in `folder`/evaluation.

    Returns the content for `write_results`: settings, seconds, and under `tasks` for each task and split the shares of
    `scores.summarize`.
    """
    parts = plan(run, prompts)
    progress = _Progress(run.stage.name, sum(len(part.asks) for part in parts))
    tasks: dict[str, dict[str, Any]] = {}
    samples: list[dict[str, Any]] = []
    aside = folder / f"{IMAGES}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    for part in parts:
        marks: list[dict[str, bool]] = []
        for start in range(0, len(part.asks), run.evaluation.batch):
            asks = part.asks[start : start + run.evaluation.batch]
            responses = respond(batch(asks, run.stage.resolution))
            marks += [judge(ask, r.image, r.words) for ask, r in zip(asks, responses, strict=True)]
            kept = max(0, KEPT - start)
            samples += [
                _keep(ask, response, marks[ask.number], run.stage.resolution, aside)
                for ask, response in zip(asks[:kept], responses[:kept], strict=True)
            ]
            progress.say(part, marks, len(asks))
        tasks.setdefault(part.task, {})[part.split] = summarize(part.asks, marks)
    (aside / SAMPLES_FILE).write_text(json.dumps(samples, indent=1), encoding="utf-8")
    shutil.rmtree(folder / IMAGES, ignore_errors=True)
    os.replace(aside, folder / IMAGES)
    return _settings(run, prompts) | sampling | {"seconds": round(progress.seconds, 1), "tasks": tasks}


def write_results(results: dict[str, Any], folder: Path) -> Path:
    """Write `folder`/evaluation.json atomically; return its path."""
    replace_text(folder / RESULTS_FILE, json.dumps(results, indent=1))
    return folder / RESULTS_FILE


def _settings(run: StageRun, prompts: int) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "stage": run.stage.name,
        "prompts": prompts,
        "resolution": run.stage.resolution,
        "seed": run.sampling.seed,
        "torch": torch.__version__,
    }


def _keep(
    ask: HeldOutRequest, response: Response, marks: dict[str, bool], resolution: int, folder: Path
) -> dict[str, Any]:
    """Save the images of one request; return its entry in samples.json."""
    stem = f"{ask.task}_{ask.split}_{ask.number:02d}"
    images = {f"input{n}": render(scene, resolution) for n, scene in enumerate(ask.sources)}
    if ask.target is not None and ask.task not in (Task.RECONSTRUCTION, Task.UNDERSTANDING, Task.CAPTION):
        images["target"] = render(ask.target, resolution)
    images["output"] = response.image
    for name, image in images.items():
        image.save(folder / f"{stem}_{name}.png")
    return {
        "task": ask.task,
        "split": ask.split,
        "number": ask.number,
        "text": ask.text,
        "group": ask.group,
        "right": marks[HEADLINE[ask.task]],
        "marks": marks,
        "seen": seen(response.image),
        "words": response.words,
        "images": {name: f"{stem}_{name}.png" for name in images},
    }
