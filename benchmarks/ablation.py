"""What a choice of the bridge is worth: the same curriculum with each choice, from zero, with several seeds.

    OMP_NUM_THREADS=1 python -m benchmarks.ablation options --jobs 2    # options of the bridge, stage 1
    OMP_NUM_THREADS=1 python -m benchmarks.ablation claim --jobs 2      # queries and source latents, stages 1 to 3
    OMP_NUM_THREADS=1 python -m benchmarks.ablation post-training --steps 120 --jobs 2     # a stage with RecA

Each arm is the config of its study with the fields of `STUDIES`; arms differ in nothing else, and the runs of
a seed draw the same samples, noise and times. Every run is a run folder below `--work`, made by `wemmu run`: the same
command continues where it was stopped, and the results are written after each run. `--steps` is the number of steps of
stage 1; the steps of the other stages keep their proportions to it. `--resolution 32` is for all stages, and faster.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import matplotlib
import torch
import typer
from scipy.stats import t as student
from torch import Tensor, nn

from benchmarks.measure import RESULTS, ROOT, Out, Quick, save, table
from benchmarks.study import write_data
from wemmu.checkpoint import retention
from wemmu.config import Curriculum, dump, load_curriculum, load_stage
from wemmu.config.benchmarks import ShapesOptions
from wemmu.config.task import Task
from wemmu.evaluation.generation import request_of
from wemmu.evaluation.scores import HEADLINE
from wemmu.evaluation.shapes.benchmark import Shapes
from wemmu.jsonlines import read_lines
from wemmu.noise import Noise
from wemmu.positions import token_grid
from wemmu.readable import valid
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.training.build import load_trained

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIGS = ROOT / "configs" / "shapes"


class Study(StrEnum):
    OPTIONS = "options"
    CLAIM = "claim"
    POST_TRAINING = "post-training"


@dataclass(frozen=True)
class Plan:
    """stages: how many of the config. arms: name -> fields that differ; the others are compared with the first one."""

    config: str
    stages: int
    arms: dict[str, list[str]]


def _learnable(design: str) -> list[str]:
    trained = "vae_branch, pathway, position_mlp, queries"
    return [
        f"recipe.bridge.queries.design={design}",
        f"stages.stage1.trains=[{trained}]",
        *(f"stages.{stage}.trains=[{trained}, dit]" for stage in ("stage2", "stage3", "stage4")),
    ]


STUDIES = {
    Study.OPTIONS: Plan(
        "curriculum.yaml",
        1,
        {
            "as the paper": [],
            "2 layers, stacked": ["recipe.bridge.states={layers: 2, combine: stack}"],
            "2 layers, routed": ["recipe.bridge.states={layers: 2, combine: route}"],
            "states normalised": ["recipe.bridge.states.normalise=true"],
            "table spans": ["recipe.bridge.position_crop=span"],
            "sincos queries": ["recipe.bridge.queries.position=sincos"],
            "half of the reconstruction without VAE": ["recipe.bridge.reconstruct_without_vae=0.5"],
        },
    ),
    Study.CLAIM: Plan(
        "curriculum.yaml",
        3,
        {
            "noisy + VAE branch": [],
            "noisy": [
                "recipe.bridge.vae_branch=false",
                "stages.stage1.trains=[pathway, position_mlp]",
                *(f"stages.{stage}.trains=[pathway, position_mlp, dit]" for stage in ("stage2", "stage3", "stage4")),
            ],
            "learnable fixed": [*_learnable("learnable_fixed"), "recipe.bridge.queries.number=16"],
            "learnable dynamic": _learnable("learnable_dynamic"),
            "source latents": ["recipe.bridge.source_latents=true"],
        },
    ),
    Study.POST_TRAINING: Plan(
        "reca.yaml",
        1,
        {
            "more of stage 3": [
                "recipe.bridge.reconstruct_without_vae=0",
                "stages.reca.mixture={t2i: 0.35, reconstruction: 0.07, unconditional: 0.04, edit: 0.54}",
            ],
            "half RecA": [],
            "mostly RecA": ["stages.reca.mixture={t2i: 0.05, reconstruction: 0.88, unconditional: 0.02, edit: 0.05}"],
        },
    ),
}
# Measure -> (task, name in the scores).
MEASURES = {
    "text to image": (Task.T2I, HEADLINE[Task.T2I]),
    "reconstruction": (Task.RECONSTRUCTION, HEADLINE[Task.RECONSTRUCTION]),
    "edit": (Task.EDIT, HEADLINE[Task.EDIT]),
    "copies the input": (Task.EDIT, "copied"),
}
# The mean over the last tenth of a stage's steps; all arms of a seed have the same samples, noise and times there.
LOSS = "loss of text to image"
KINDS = ("image tokens", "text tokens", "VAE tokens", "queries")


@dataclass(frozen=True)
class Job:
    """One run: an arm with a seed."""

    arm: str
    seed: int
    curriculum: Path
    folder: Path

    @property
    def finished(self) -> bool:
        return (self.folder / "report.html").is_file()

    def run(self) -> "Job":
        """Train and evaluate, or go on; raises CalledProcessError with the run's log on the terminal."""
        if not self.finished:
            log = self.folder.with_suffix(".txt")
            with log.open("a", encoding="utf-8") as out:
                words = [sys.executable, "-m", "launcher", "run", str(self.curriculum), "--out", str(self.folder)]
                ended = subprocess.run(words, cwd=ROOT, stdout=out, stderr=out, check=False)
            if ended.returncode:
                raise SystemExit(f"{self.arm}, seed {self.seed} ended with {ended.returncode}; its log is {log}")
        return self


def main(
    study: Study,
    work: Annotated[Path, typer.Option(help="Keeps the data and the runs.")] = Path("runs/ablation"),
    out: Out = RESULTS,
    seeds: Annotated[int, typer.Option(min=2)] = 3,
    steps: Annotated[int, typer.Option(min=6, help="Of the first stage.")] = 2000,
    resolution: Annotated[int | None, typer.Option(help="Of all stages, in px; else the curriculum's.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Runs at a time.")] = 1,
    arms: Annotated[list[str] | None, typer.Option("--arm", help="Of the study; the first one always runs.")] = None,
    quick: Quick = False,
) -> None:
    """Train every arm with every seed, score it and compare."""
    extra = [f"stages.*.resolution={resolution}"] if resolution else []
    side = f"-{resolution}px" if resolution else ""
    if quick:
        seeds, steps = 2, 6
        extra += ["data.prepare.sources.0.samples={t2i: 64, reconstruction: 64, unconditional: 64, edit: 64}"]
        extra += ["stages.*.global_batch=4", "evaluation.prompts=4", "sampling.steps=2"]
    plan = STUDIES[study]
    known, base = plan.arms, next(iter(plan.arms))
    if unknown := set(arms or ()) - known.keys():
        raise typer.BadParameter(f"the study {study} has no arm {', '.join(unknown)}; {valid(unknown, known)}")
    chosen = {name: fields for name, fields in known.items() if name == base or not arms or name in arms}
    work = work.resolve()
    planned = [
        _job(work / f"{study}-{steps}{side}", work / f"{study}-data{side}", arm, seed, steps, plan, [*fields, *extra])
        for seed in range(seeds)
        for arm, fields in chosen.items()
    ]
    write_data(planned[0].curriculum)
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(jobs) as pool, contextlib.ExitStack() as stack:
        # Ctrl-C and a failed run end the runs that began, not all that wait behind them.
        stack.callback(pool.shutdown, wait=False, cancel_futures=True)
        for ended in as_completed([pool.submit(job.run) for job in planned]):
            job = ended.result()
            rows.append({"arm": job.arm, "seed": job.seed, "stages": scores(job.folder)})
            if study is Study.CLAIM:
                rows[-1]["attention"] = attention(job.folder)
            print(f"{len(rows)} of {len(planned)} runs: {job.arm}, seed {job.seed}", flush=True)
            rows.sort(key=lambda row: (list(chosen).index(row["arm"]), row["seed"]))
            differences = list(compared(rows, base))
            name = f"ablation-{study}"
            save(out, name, markdown(rows, differences, base, steps), rows, steps=steps, differences=differences)
            figure(differences, out / f"{name}.png")


def _job(work: Path, data: Path, arm: str, seed: int, steps: int, plan: Plan, fields: list[str]) -> Job:
    """Write the curriculum of an arm with a seed."""
    whole = load_curriculum(CONFIGS / plan.config)
    share = steps / whole.stages[0].steps
    sizes = [
        f"stages.{stage.name}.{field}={max(1, round(share * value))}"
        for stage in whole.stages
        for field, value in (
            ("steps", stage.steps),
            ("optimizer.warmup", stage.optimizer.warmup),
            ("optimizer.decay", stage.optimizer.decay),
        )
    ]
    name = "".join(letter if letter.isalnum() else "-" for letter in arm.lower())
    own = [f"name={name}-{seed}", f"seed={seed}", f"data.shards={data}", "logging.wandb=disabled", "threads=1"]
    own += ["logging.checkpoint_every=500", "logging.keep_checkpoints=1", "sampling.prompts=[]"]
    curriculum: Curriculum = load_curriculum(CONFIGS / plan.config, [*sizes, *own, *fields])
    folder = work / f"{name}-{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    dump(curriculum.model_copy(update={"stages": curriculum.stages[: plan.stages]}), file)
    return Job(arm, seed, file, folder)


def scores(folder: Path) -> dict[str, dict[str, float]]:
    """Stage -> measure -> share of the held-out test requests, and `LOSS`."""
    found = {}
    for file in sorted(folder.glob("*/evaluation.json")):
        tasks = json.loads(file.read_text(encoding="utf-8"))["tasks"]
        found[file.parent.name] = {
            name: tasks[task]["test"]["measures"][measure]["share"]
            for name, (task, measure) in MEASURES.items()
            if task in tasks
        }
        lines = [line for line in read_lines(file.parent / "metrics.jsonl") if f"loss/{Task.T2I}" in line]
        found[file.parent.name][LOSS] = mean(line[f"loss/{Task.T2I}"] for line in lines[-max(1, len(lines) // 10) :])
    return found


@torch.no_grad()
def attention(folder: Path, requests: int = 32) -> dict[str, float]:
    """The share of the queries' attention that goes to each kind of token, for edits; mean over layers and heads."""
    stage = sorted(folder.glob("stage*/config.yaml"))[-1].parent
    run, newest = load_stage(stage / "config.yaml"), retention.latest(stage / "checkpoints")
    assert newest is not None, "the stage is finished"
    made = load_trained(run, newest)
    model, weights = made.model, list[Tensor]()
    assert isinstance(model, WeMMU)
    edits = Shapes(ShapesOptions(prompts=requests, tasks=(Task.EDIT,)), run)
    asked = request_of(edits.requests(), (run.stage.resolution, run.stage.resolution))
    height, width = asked.images.shape[-2:]
    grid = token_grid(height, width, made.token_px)
    prompts = made.encoder(asked.texts, [[grid]] * requests)

    def keep(module: nn.Module, arguments: Any, result: tuple[Tensor, Tensor]) -> None:
        weights.append(result[1])  # [B, heads, VAE tokens and queries, prompt and these]

    layer: Any
    for layer in model.bridge.pathway.layers:
        # Only this implementation returns its weights.
        layer.self_attn.config._attn_implementation = "eager"
        layer.self_attn.register_forward_hook(keep)
    states = model.condition(prompts, asked.images, asked.size, Noise(0, 0, asked.sample_ids)).states
    length, queries = prompts.input_ids.shape[1], states.shape[1]
    of_queries = torch.stack(weights).mean((0, 2))[:, -queries:].mean(1)  # [B, prompt and VAE tokens and queries]
    images = prompts.input_ids == model.vlm.image_token_id
    shares = (
        (of_queries[:, :length] * images).sum(1),
        (of_queries[:, :length] * ~images).sum(1),
        of_queries[:, length:-queries].sum(1),
        of_queries[:, -queries:].sum(1),
    )
    return {kind: float(share.mean()) for kind, share in zip(KINDS, shares, strict=True)}


def compared(rows: list[dict[str, Any]], base: str) -> Iterator[dict[str, Any]]:
    """Yield each arm's difference from `base`, paired by seed, with Student's 95 % interval of the mean over seeds."""
    of = {(row["arm"], row["seed"]): row["stages"] for row in rows}
    for arm in dict.fromkeys(row["arm"] for row in rows if row["arm"] != base):
        seeds = sorted(seed for name, seed in of if name == arm and (base, seed) in of)
        for stage in dict.fromkeys(stage for seed in seeds for stage in of[arm, seed]):
            for measure in of[arm, seeds[0]][stage]:
                each = [of[arm, seed][stage][measure] - of[base, seed][stage][measure] for seed in seeds]
                half = student.ppf(0.975, len(each) - 1) * stdev(each) / len(each) ** 0.5 if len(each) > 1 else None
                yield {
                    "arm": arm, "stage": stage, "measure": measure, "by_seed": each,
                    "difference": mean(each), "half": None if half is None else float(half),
                }  # fmt: skip


def markdown(rows: list[dict[str, Any]], differences: list[dict[str, Any]], base: str, steps: int) -> list[str]:
    lines = [
        f"The first stage has {steps} steps of 64 samples; shares of 200 held-out requests, mean (each seed).",
        "",
    ]
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    for stage in dict.fromkeys(stage for row in rows for stage in row["stages"]):
        of = {
            arm: [row["stages"][stage] for row in rows if row["arm"] == arm and stage in row["stages"]] for arm in arms
        }
        measures = next(list(each[0]) for each in of.values() if each)
        cells = (
            [arm, *(_shares([one[m] for one in each], 3 if m == LOSS else 2) for m in measures)]
            for arm, each in of.items()
        )
        lines += [f"After {stage}:", "", *table(["arm", *measures], cells)]
        lines += ["", f"Difference from `{base}`, shares in points (95 % interval of the mean over seeds):", ""]
        apart = {arm: [d for d in differences if (d["arm"], d["stage"]) == (arm, stage)] for arm in arms if arm != base}
        lines += table(["arm", *measures], ([arm, *map(_difference, each)] for arm, each in apart.items() if each))
        lines.append("")
    if attended := [row for row in rows if "attention" in row]:
        looks = {arm: [row["attention"] for row in attended if row["arm"] == arm] for arm in arms}
        lines += ["Attention of the queries after the last stage, edits:", ""]
        cells = ([arm, *(_shares([one[kind] for one in each]) for kind in KINDS)] for arm, each in looks.items())
        lines += table(["arm", *KINDS], cells)
    return lines


def _shares(values: list[float], digits: int = 2) -> str:
    each = ", ".join(f"{value:.{digits}f}" for value in values)
    return f"{mean(values):.{digits}f} ({each})" if values else "-"


def _difference(found: dict[str, Any]) -> str:
    scale, digits = (1, 3) if found["measure"] == LOSS else (100, 0)
    half = "one seed" if found["half"] is None else f"± {scale * found['half']:.{digits}f}"
    return f"{scale * found['difference']:+.{digits}f} ({half})"


def figure(differences: list[dict[str, Any]], file: Path) -> None:
    """Draw the differences after the last stage, with intervals, each seed as a dot."""
    if not differences:
        return
    last = max(d["stage"] for d in differences)
    mine = [d for d in differences if d["stage"] == last]
    measures = list(dict.fromkeys(d["measure"] for d in mine if d["measure"] != LOSS))
    arms = list(dict.fromkeys(d["arm"] for d in mine))
    drawn, axes = plt.subplots(1, len(measures), figsize=(3.4 * len(measures) + 2, 0.4 * len(arms) + 1.2), sharey=True)
    for axis, measure in zip(axes if len(measures) > 1 else [axes], measures, strict=True):
        for d in (d for d in mine if d["measure"] == measure):
            at = arms.index(d["arm"])
            axis.errorbar(100 * d["difference"], at, xerr=100 * (d["half"] or 0), fmt="o", capsize=3, color="C0")
            axis.scatter([100 * value for value in d["by_seed"]], [at + 0.2] * len(d["by_seed"]), s=8, color="gray")
        axis.axvline(0, color="gray", linewidth=0.8)
        axis.set(title=measure, xlabel="points", yticks=range(len(arms)), yticklabels=arms)
    axes_first = axes[0] if len(measures) > 1 else axes
    axes_first.invert_yaxis()
    drawn.tight_layout()
    drawn.savefig(file, dpi=110)
    plt.close(drawn)


if __name__ == "__main__":
    typer.run(main)
