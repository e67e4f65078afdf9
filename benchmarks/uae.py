"""Does a policy learn to describe from what a generator reconstructs? Rewards against steps, with controls.

    OMP_NUM_THREADS=1 python -m benchmarks.uae --work runs/uae-benchmark --seeds 3

One cold start makes captions that leave out half of what there is to say. From it every run learns with the reward of
one encoder; another encoder, which rewards nothing, and the exact scorer watch. Arms: `reward`; `deranged`, rewarded by
another image; `constant`, rewarded for nothing, whose weights must keep every bit. `--work` keeps the runs; run again,
it goes on.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

from benchmarks.measure import RESULTS, ROOT, Out, save, table
from benchmarks.study import trained, unchanged, write_data
from wemmu import evaluate
from wemmu.config import load_curriculum
from wemmu.config.task import Task
from wemmu.jsonlines import read_lines

matplotlib.use("Agg")
import matplotlib.pyplot as plt

CONFIG = ROOT / "configs" / "shapes" / "uae.yaml"
# Arm -> control of the reward, and its share of the steps.
ARMS = {"reward": ("none", 1.0), "deranged": ("deranged", 1.0), "constant": ("constant", 0.1)}
CURVES = ("reward", "reward/own", "reward/held_out", "length", "entropy", "zero_std")


def main(
    work: Annotated[Path, typer.Option(help="Where the runs are kept.")],
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    steps: Annotated[int, typer.Option(min=10)] = 200,
    prompts: Annotated[int, typer.Option(min=1, help="Held-out scenes of each evaluation.")] = 90,
    out: Out = RESULTS,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Of every run.")] = None,
) -> None:
    """Train, score and tell."""
    work.mkdir(parents=True, exist_ok=True)
    shared = [*(overrides or []), f"data.shards={work / 'data'}", "logging.wandb=disabled", "sampling.prompts=[]"]
    write_data(CONFIG, shared)
    cold = trained(work / "cold", load_curriculum(CONFIG, shared).stage_run("cold"))
    before = scored(work / "cold", prompts)
    found: list[dict[str, Any]] = []
    for seed in range(seeds):
        for arm, (control, share) in ARMS.items():
            own = [f"seed={seed}", f"recipe.reward.control={control}", f"stages.reward.start={cold}"]
            own += [f"stages.reward.steps={int(share * steps)}", "logging.every=5"]
            folder = work / f"{arm}-{seed}"
            newest = trained(folder, load_curriculum(CONFIG, [*shared, *own]).stage_run("reward"))
            scores, same = scored(folder, prompts), unchanged(newest, cold)
            found.append({"arm": arm, "seed": seed, "scores": scores, "unchanged": same, "curves": curves(folder)})
            report(out, before, found, steps)


def scored(folder: Path, prompts: int) -> dict[str, float]:
    """Return shares of held-out test scenes: captions that are true, that are complete, and images restored."""
    evaluate.main(folder, prompts=prompts)
    tasks = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))["tasks"]
    return {name: of["share"] for name, of in tasks[Task.CAPTION]["test"]["measures"].items()}


def curves(folder: Path) -> dict[str, list[float]]:
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "reward" in line]
    return {name: [line[name] for line in lines] for name in ("step", *CURVES) if name in lines[0]}


def report(out: Path, before: dict[str, float], found: list[dict[str, Any]], steps: int) -> None:
    """Write the record, the table and the figure of what there is so far."""
    lines = [
        "What rewards of a reconstruction teach. Own, held out: the cosine of image and reconstruction under the",
        "encoder that rewards and under one that rewards nothing, of the first and the last steps recorded. Likeliest",
        "captions of held-out scenes, by the exact scorer: true; complete; restored, whose rendering shows the scene.",
        "",
    ]
    columns = ("arm", "seed", "own, first -> last", "held out, first -> last", "length")
    rows = [["cold start", "", "", "", "", *_shares(before), ""]]
    for run in found:
        of = run["curves"]
        own = of.get("reward/own", of["reward"])
        ends = [f"{curve[0]:.3f} -> {curve[-1]:.3f}" for curve in (own, of["reward/held_out"])]
        length = f"{of['length'][0]:.1f} -> {of['length'][-1]:.1f}"
        weights = "unchanged" if run["unchanged"] else "moved"
        rows.append([run["arm"], run["seed"], *ends, length, *_shares(run["scores"]), weights])
    lines += table([*columns, "true", "complete", "restored", "weights"], rows)
    save(out, "uae", lines, found, steps=steps, cold=before)
    figure(out / "uae.png", found)


def _shares(scores: dict[str, float]) -> list[str]:
    return [f"{scores[name]:.2f}" for name in ("true", "complete", "same")]


def figure(file: Path, found: list[dict[str, Any]]) -> None:
    colors = dict(zip(ARMS, ("tab:blue", "tab:orange", "tab:gray"), strict=True))
    titles = {
        "reward/own": "cosine, rewarding encoder",
        "reward/held_out": "cosine, held-out encoder",
        "length": "tokens",
    }
    _, axes = plt.subplots(1, 3, figsize=(11, 3), layout="constrained")
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for run in found:
            of = run["curves"]
            label = run["arm"] if run["seed"] == 0 else None
            axis.plot(of["step"], of.get(name, of["reward"]), color=colors[run["arm"]], label=label, lw=1)
        axis.set(title=title, xlabel="step")
    axes[0].legend(frameon=False)
    plt.savefig(file, dpi=110)
    plt.close()


if __name__ == "__main__":
    typer.run(main)
