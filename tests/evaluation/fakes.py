"""A model that knows the answers, and a run folder as a run would leave it; neither needs a network."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from wemmu.config import Curriculum, StageRun, Task, dump
from wemmu.config.schema import Sampling
from wemmu.evaluation.generation import Draw, request_of
from wemmu.evaluation.requests import HeldOutRequest
from wemmu.evaluation.shapes.benchmark import Shapes
from wemmu.evaluation.shapes.results import evaluate, options_of
from wemmu.pixels import to_images, to_pixels
from wemmu.recipes.wemmu.recipe import WeMMURecipe
from wemmu.sampling.request import GenerationRequest, Response
from wemmu.shapes.render import render
from wemmu.shapes.scene import Scene, random_scene

MIXTURES = {
    "stage1": {"t2i": 0.55, "reconstruction": 0.4, "unconditional": 0.05},
    "stage4": {"t2i": 0.2, "reconstruction": 0.1, "unconditional": 0.05, "edit": 0.3, "multi_edit": 0.35},
}
PATHWAY = {"bridge.pathway.layers.0.weight": [128, 128], "bridge.position_mlp.down.weight": [128, 128]}
DIT = {"dit.proj_out.weight": [32, 128]}
HASHES = {"vlm": "a" * 64, "vae": "b" * 64, "dit": "c" * 64}


def curriculum(start: str | None = None) -> Curriculum:
    """Two stages of the miniature, at 32 and 64 px; `start` names weights for both."""
    return Curriculum.model_validate(
        {
            "name": "toy",
            "backbones": {"vlm": "assets/vlm", "sana": "assets/sana"},
            "data": {"shards": "no-such-shards"},
            "memory": {"micro_batch": 4, "reference_resolution": 64},
            "evaluation": {"prompts": 8, "batch": 5},
            "stages": [
                {
                    "name": name,
                    "resolution": resolution,
                    "steps": 100,
                    "global_batch": 4,
                    "trains": trains,
                    "optimizer": {"lr": 1e-3, "module_lr": {"dit": 1e-4}},
                    "mixture": MIXTURES[name],
                    "start": start,
                }
                for name, resolution, trains in (
                    ("stage1", 32, ["pathway", "position_mlp"]),
                    ("stage4", 64, ["pathway", "position_mlp", "dit"]),
                )
            ],
        }
    )


def stage_run(name: str) -> StageRun:
    return curriculum().stage_run(name)


# What to draw for a request, as an image of (height, width) px.
Answer = Callable[[HeldOutRequest, tuple[int, int]], Image.Image]


class Painter:
    """Draws like a `Sampler`; it recognises a request by its id and answers as it was told."""

    def __init__(self, run: StageRun, prompts: int, answer: Answer):
        self.asks = {ask.sample_id: ask for ask in Shapes(options_of(run, prompts), run).held_out.values()}
        self.answer = answer

    def __call__(self, request: GenerationRequest, sampling: Sampling) -> Tensor:
        asks = [self.asks[sample_id] for sample_id in request.sample_ids.tolist()]
        assert [ask.text for ask in asks] == list(request.texts)
        return to_pixels([self.answer(ask, request.size) for ask in asks])


def drawing(painter: Callable[[GenerationRequest, Sampling], Tensor], run: StageRun) -> Draw:
    """Answer evaluations by a painter."""
    size = (run.stage.resolution, run.stage.resolution)
    return lambda asked: [Response(image) for image in to_images(painter(request_of(asked, size), run.sampling))]


def settings(run: StageRun, checkpoint: str = "") -> dict[str, Any]:
    """What the images of a stage's evaluation depend on."""
    model = {"stage": run.stage.name, "step": 100, "ema": False, "checkpoint": checkpoint}
    return {"model": model, "sampling": WeMMURecipe.sampling(run), "resolution": run.stage.resolution}


def perfect(ask: HeldOutRequest, size: tuple[int, int]) -> Image.Image:
    """The target; for a request of nothing in particular, some scene."""
    return render(ask.target or any_scene(), size)


def copied(ask: HeldOutRequest, size: tuple[int, int]) -> Image.Image:
    """The first input image again."""
    return render(ask.sources[0] if ask.sources else any_scene(), size)


def noise(ask: HeldOutRequest, size: tuple[int, int]) -> Image.Image:
    return Image.frombytes("RGB", size[::-1], random.Random(ask.sample_id).randbytes(3 * size[0] * size[1]))


def mostly(ask: HeldOutRequest, size: tuple[int, int]) -> Image.Image:
    """Right three times in four, else noise or a copy."""
    return (perfect, perfect, perfect, copied if ask.sources else noise)[ask.number % 4](ask, size)


def any_scene() -> Scene:
    return random_scene(random.Random(0), "test")


def write_run(folder: Path, start: str | None = None, answer: Answer = mostly) -> Path:
    """A finished run of `curriculum`, with everything but checkpoints' tensors and shards."""
    config = curriculum(start)
    folder.mkdir(parents=True)
    dump(config, folder / "curriculum.yaml")
    for stage in config.stages:
        home = folder / stage.name
        home.mkdir()
        run = config.stage_run(stage.name)
        dump(run, home / "config.yaml")
        _write_metrics(home / "metrics.jsonl", run)
        _write_manifest(home, run)
        evaluate(run, 8, home, lambda run=run: drawing(Painter(run, 8, answer), run), settings(run))
    _write_ledger(folder / "ledger.jsonl")
    return folder


def _write_metrics(file: Path, run: StageRun) -> None:
    rng = random.Random(run.stage.name)
    tasks = [str(task) for task in run.stage.mixture if task is not Task.UNDERSTANDING]
    lines = []
    for step in range(5, 101, 5):
        loss = 0.4 + math.exp(-step / 30) + rng.gauss(0, 0.02)
        line = {"step": step, "loss": loss, "grad_norm": 0.5 + rng.random(), "samples_per_s": 90.0}
        line |= {f"loss/{task}": loss * (0.8 + 0.1 * k) for k, task in enumerate(tasks) if rng.random() < 0.8}
        line |= {f"loss/t_{k / 4:.2f}_{(k + 1) / 4:.2f}": loss * (1.4 - 0.3 * k) for k in range(4)}
        lines.append(json.dumps(line))
    file.write_text("\n".join(lines) + '\n{"step": 105, "lo')  # as a kill leaves it


def _write_manifest(home: Path, run: StageRun) -> None:
    with_dit = "dit" in run.stage.trains
    manifest = {
        "format": 1,
        "stage": run.stage.name,
        "step": 100,
        "seed": 0,
        "resolution": run.stage.resolution,
        "tensors": PATHWAY | (DIT if with_dit else {}),
        "trained": sorted(PATHWAY | (DIT if with_dit else {})),
        "frozen": {k: v for k, v in HASHES.items() if k != "dit" or not with_dit},
        "files": {},
        "libraries": {"python": "3.11", "torch": torch.__version__},
    }
    directory = home / "checkpoints" / "step_00000100"
    directory.mkdir(parents=True)
    (directory / "manifest.json").write_text(json.dumps(manifest))


def _write_ledger(file: Path) -> None:
    lines, minute = [], 0
    for job in ("data", "stage1", "stage1/evaluation", "stage4", "stage4/evaluation", "export", "report"):
        stamp = "2030-01-01T00:{:02d}:00+00:00"
        lines.append({"job": job, "attempt": 1, "event": "started", "pid": 1, "time": stamp.format(minute)})
        minute += 3
        if job != "report":
            ended = {"job": job, "attempt": 1, "event": "ended", "pid": 1, "exit_code": 0, "reason": "finished"}
            lines.append(ended | {"time": stamp.format(minute)})
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
