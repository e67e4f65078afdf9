"""Does it help a VLM to answer if it must also restore the image? The same runs with and without that loss.

    OMP_NUM_THREADS=1 python -m benchmarks.ross --work runs/ross-evidence      # some 2 minutes for each of 12 runs

The start is the shipped VLM with a new projector (another one for each seed): a language model that knows its words, a
vision tower that sees, and nothing between them, as where LLaVA's recipe begins. Each image of training comes with a
conversation of four turns, "what is at the top left?" and so on. All runs of a seed have the same start and steps, see
the same conversations in the same order, and are asked the same held-out questions, which need fine detail: what a
small object is, and what objects are whose colour and shape never came together in training. They are asked at half,
three quarters and the end of the steps.

`--work` keeps the runs; the same command continues where it was stopped. The results are written after each run.
"""

import json
import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from benchmarks import study
from benchmarks.measure import RESULTS, ROOT, Out, Quick, save
from benchmarks.ross_report import KINDS, Differences, compared, markdown
from wemmu.config import load_curriculum
from wemmu.config.checkpoints import own_checkpoints, sheet
from wemmu.config.files import replace_text
from wemmu.config.schema import StageRun
from wemmu.config.task import Task
from wemmu.objectives.reconstruction import answer_cross_entropy
from wemmu.pixels import fitted, to_images
from wemmu.positions import token_grid
from wemmu.recipes.ross.config import ReconstructiveTuning, Ross
from wemmu.recipes.ross.recipe import RossRecipe
from wemmu.sampling.mode import in_eval_mode
from wemmu.sampling.request import GenerationRequest
from wemmu.shapes.render import render
from wemmu.shapes.scene import CELLS, HELD_OUT, Object, Scene, Split, random_scene
from wemmu.shapes.scorer import same_scene
from wemmu.training.build import load_trained
from wemmu.types import IGNORE_INDEX

CONFIG = ROOT / "configs" / "shapes" / "ross.yaml"
DENOISER = {"kind": "denoiser", "depth": 3, "width": 128, "heads": 4}
# What is trained beside the answers -> (weight of it, the recipe).
ARMS: dict[str, tuple[float, dict[str, Any]]] = {
    "answers only": (0.0, {"head": DENOISER}),
    "latents, denoised": (1.0, {"head": DENOISER}),
    "latents, regressed": (1.0, {"head": {"kind": "mlp"}}),
    "pixels, regressed": (1.0, {"head": {"kind": "mlp"}, "target": {"kind": "pixels"}}),
}
BATCH, RESTORED = 64, 64


def main(
    work: Annotated[Path, typer.Option(help="Keeps data, runs and scores.")] = Path("runs/ross-evidence"),
    out: Out = RESULTS,
    seeds: Annotated[int, typer.Option(min=2, max=5, help="Runs of each arm.")] = 3,
    steps: Annotated[int, typer.Option(min=4, help="Steps of each run, of 16 images and 64 questions.")] = 200,
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions of each kind.")] = 200,
    quick: Quick = False,
) -> None:
    """Train, ask, compare."""
    images = 6000
    if quick:
        seeds, steps, questions, images = 2, 4, 8, 64
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    write_data(work, images)
    rows: list[dict[str, Any]] = []
    # All arms of a seed are whole before the next one begins.
    for seed in range(seeds):
        start = new_projector(work / f"vlm-{seed}", seed)
        for arm, (weight, recipe) in ARMS.items():
            folder = folder_of(work, arm, seed)
            run = stage(work, start, seed, steps, weight, recipe)
            study.trained(folder, run)
            rows.append({"arm": arm, "seed": seed, **scored(folder, run, questions)})
            differences: Differences = list(compared(rows))
            short = [{k: _means(v) if isinstance(v, dict) else v for k, v in row.items()} for row in rows]
            about = {"steps": steps, "questions": questions, "differences": differences}
            save(out, "ross", markdown(rows, differences, steps, questions), short, **about)
        if seed == 0:
            restorations(work, steps).save(out / "ross-restored.png")


def folder_of(work: Path, arm: str, seed: int) -> Path:
    return work / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"


def restorations(work: Path, steps: int) -> Image.Image:
    """Return the last sheets of samples of the arms that restore, one below the other, of the first seed."""
    arms = [arm for arm, (weight, _) in ARMS.items() if weight]
    sheets = [Image.open(sheet(folder_of(work, arm, 0), steps)) for arm in arms]
    page = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    for number, each in enumerate(sheets):
        page.paste(each, (0, sum(s.height for s in sheets[:number])))
    return page


def _means(by_kind: dict[str, list[float]]) -> dict[str, float]:
    return {kind: round(sum(values) / len(values), 4) for kind, values in by_kind.items()}


def stage(work: Path, start: Path, seed: int, steps: int, weight: float, recipe: dict[str, Any]) -> StageRun:
    overrides = {
        "backbones.vlm": start,
        "data.shards": work / "data",
        "seed": seed,
        "threads": 1,
        "logging.wandb": "disabled",
        "logging.samples_every": steps,
        "logging.checkpoint_every": steps // 4,
        "logging.keep_checkpoints": 4,
        "stages.tune.steps": steps,
        "stages.tune.global_batch": 16,
        "stages.tune.objective.weight": weight,
        "stages.tune.optimizer.lr": 1e-3,
        "stages.tune.optimizer.warmup": min(20, steps // 4),
        "stages.tune.optimizer.decay": steps // 3,
    }
    run = load_curriculum(CONFIG, [f"{field}={value}" for field, value in overrides.items()]).stage_run("tune")
    return run.model_copy(update={"recipe": Ross.model_validate(recipe)})


def new_projector(folder: Path, seed: int) -> Path:
    """Write the shipped VLM with a projector drawn anew."""
    if (folder / "config.json").is_file():
        return folder
    source = load_curriculum(CONFIG).backbones.vlm
    vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(source)
    generator = torch.Generator().manual_seed(seed)
    for layer in vlm.model.visual.merger.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            torch.nn.init.zeros_(layer.bias)
    AutoProcessor.from_pretrained(source, use_fast=True).save_pretrained(folder)
    vlm.save_pretrained(folder)
    return folder


def write_data(work: Path, images: int) -> None:
    """Write images and conversations in LLaVA's format, and their shards; or find them there."""
    talks, rng = work / "talks", random.Random("ross/train")
    if not (talks / "talks.json").is_file():
        talks.mkdir(exist_ok=True)
        rows = [_conversation(talks / f"{number}.png", rng) for number in range(images)]
        replace_text(talks / "talks.json", json.dumps(rows))
    source = f"[{{kind: conversations, name: talks, path: {talks}/talks.json, root: {talks}}}]"
    study.write_data(CONFIG, [f"data.shards={work / 'data'}", f"data.prepare.sources={source}"])


def _conversation(file: Path, rng: random.Random) -> dict[str, Any]:
    """Draw a scene of training, and ask about its four cells in any order."""
    scene = random_scene(rng)
    render(scene, 64).save(file)
    turns = []
    for number, cell in enumerate(rng.sample(range(len(CELLS)), len(CELLS))):
        question = _question(cell) if number else f"<image>\n{_question(cell)}"
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": _answer(scene.at(cell))}]
    return {"id": file.stem, "image": file.name, "conversations": turns}


def _question(cell: int) -> str:
    return f"what is at the {CELLS[cell]}?"


def _answer(obj: Object | None) -> str:
    return f"a {obj.size} {obj.color} {obj.shape}" if obj else "nothing"


def scored(folder: Path, run: StageRun, questions: int) -> dict[str, Any]:
    """Ask the model at half, three quarters and all of its steps, or read what it answered before.

    `right` and `nll` are those of the end, `right over the run` is the mean of the three.
    """
    file = folder / "scores.json"
    if not file.is_file():
        points = []
        for checkpoint in own_checkpoints(folder / "checkpoints")[1:]:
            made: Any = load_trained(run, checkpoint)
            points.append({kind: ask(made, asked(kind, questions)) for kind in KINDS})
        objective = run.stage.objective
        assert isinstance(objective, ReconstructiveTuning)
        images = restored(made, questions) if objective.weight else {}
        replace_text(file, json.dumps({"points": points} | images))
    found = json.loads(file.read_text(encoding="utf-8"))
    points = found.pop("points")
    for name in ("right", "nll"):
        found[name] = {kind: points[-1][kind][name] for kind in KINDS}
        found[f"{name} over the run"] = {
            kind: np.mean([point[kind][name] for point in points], axis=0).tolist() for kind in KINDS
        }
    found["progress"] = {kind: [float(np.mean(point[kind]["right"])) for point in points] for kind in KINDS}
    return found


def asked(kind: str, number: int) -> list[tuple[Scene, str, str]]:
    """Return scenes that training has not seen, each with a question about one object and the answer."""
    rng, found = random.Random(f"ross/{kind}"), list[tuple[Scene, str, str]]()
    split: Split = "composition" if kind == "new pair" else "test"
    while len(found) < number:
        scene = random_scene(rng, split)
        if objects := [obj for obj in scene.objects if _is(kind, obj)]:
            obj = rng.choice(objects)
            found.append((scene, _question(obj.cell), _answer(obj)))
    return found


def _is(kind: str, obj: Object) -> bool:
    return (obj.color, obj.shape) in HELD_OUT if kind == "new pair" else obj.size == kind


@torch.no_grad()
def ask(made: RossRecipe, questions: list[tuple[Scene, str, str]]) -> dict[str, list[float]]:
    """Return of each question whether the answer is right, word by word, and its negative log-likelihood per token."""
    right: list[float] = []
    nll: list[float] = []
    for first in range(0, len(questions), BATCH):
        scenes, texts, answers = (list(column) for column in zip(*questions[first : first + BATCH], strict=True))
        request = _request(scenes, texts)
        said = made.answerer.answers(request, limit=8)
        right += [float(a == b) for a, b in zip(said, answers, strict=True)]
        nll += in_eval_mode(_nll)(made, request, answers).tolist()
    return {"right": right, "nll": nll}


def _nll(made: RossRecipe, request: GenerationRequest, answers: list[str]) -> Tensor:
    grid = token_grid(*request.size, made.token_px)
    prompts, labels = made.encoder.answered(request.texts, answers, [[grid]] * len(answers))
    rows, tokens = (labels != IGNORE_INDEX).nonzero(as_tuple=True)
    logits = made.model.logits(made.model.states(prompts, request.images).text[rows, tokens])
    return answer_cross_entropy(logits, labels[rows, tokens], rows, len(labels))


def restored(made: RossRecipe, questions: int) -> dict[str, float]:
    """How many restored images show their scene, by the exact scorer, and the mean error of a pixel in [0, 1]."""
    scenes = [scene for scene, _, _ in asked("small", min(RESTORED, questions))]
    request = _request(scenes, [""] * len(scenes))
    back = made.answerer.restored(request, steps=50, seed=0)[:, 0]
    same = [same_scene(image, scene) for image, scene in zip(to_images(back), scenes, strict=True)]
    error = float((back / 2 + 0.5 - request.images[:, 0] / 255).square().mean().sqrt())
    return {"restored": sum(same) / len(same), "rmse": error}


def _request(scenes: list[Scene], texts: list[str]) -> GenerationRequest:
    """Questions about scenes, whose images are uint8 [B, 1, 3, 64, 64]."""
    images = torch.stack([fitted(render(scene, 64), (64, 64)) for scene in scenes])[:, None]
    return GenerationRequest(Task.UNDERSTANDING, texts, images, (64, 64), torch.arange(len(texts)))


if __name__ == "__main__":
    typer.run(main)
