"""What does UAE's third stage do to text to image? Flow-GRPO on the miniature's generator, which is weak at relations.

    OMP_NUM_THREADS=1 python -m benchmarks.uae_paths --work runs/uae-paths --steps 60

The generator draws captions of the data set that tell the place of one object by the other; CLIP's cosine of image and
scene rewards it, DINOv2 watches. Arms: `reward`; `deranged`, rewarded by another image; `constant`, rewarded for
nothing, whose weights must keep every bit. Before and after, `--seeds` images of each prompt are read by the exact
scorer. `--work` keeps the runs; run again, it goes on.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.measure import RESULTS, ROOT, Out
from benchmarks.prompts import right
from benchmarks.uae import CONFIG, trained
from tools.convert_ckpt import export, find
from wemmu.checkpoint.stored import StoredTensors
from wemmu.config import load_curriculum
from wemmu.pipeline import WeMMUPipeline
from wemmu.recipes.uae.config import UAE

ARMS = {"reward": ("none", 1.0), "deranged": ("deranged", 1.0), "constant": ("constant", 0.1)}
PROMPTS = (
    "a red circle above a blue square",
    "a yellow triangle below a green cross",
    "a cyan square left of a red triangle",
    "a purple cross right of a yellow circle",
    "a large red circle at the top left",
)
OBJECTIVE = "{kind: flow_grpo, group: 8, window: 2, captions: data}"


def main(
    work: Annotated[Path, typer.Option(help="Where the runs are kept.")],
    steps: Annotated[int, typer.Option(min=10)] = 60,
    seeds: Annotated[int, typer.Option(min=1, help="Images of each prompt.")] = 40,
    rate: Annotated[float, typer.Option(help="Learning rate.")] = 1e-5,
    arms: Annotated[list[str] | None, typer.Option("--arm", help="Of reward, deranged, constant; repeatable.")] = None,
    out: Out = RESULTS,
) -> None:
    """Train, draw and count."""
    work.mkdir(parents=True, exist_ok=True)
    source = "data.prepare.sources=[{kind: shapes, samples: {t2i: 4000}, captions: {related: 1.0}}]"
    shared = [source, f"data.shards={work / 'data'}", "logging.wandb=disabled", "sampling.prompts=[]"]
    words = [word for one in shared for word in ("--set", one)]
    subprocess.run([sys.executable, "-m", "wemmu", "data", "write", str(CONFIG), *words], cwd=ROOT, check=True)
    found: list[dict[str, Any]] = []
    for arm in arms or list(ARMS):
        control, share = ARMS[arm]
        own = [f"recipe.reward.control={control}", f"stages.reward.objective={OBJECTIVE}", "stages.reward.trains=[dit]"]
        own += [f"stages.reward.steps={max(2, int(share * steps))}", f"stages.reward.optimizer.lr={rate}"]
        own += ["logging.every=2", "recipe.generator.micro_batch=64"]
        run = load_curriculum(CONFIG, [*shared, *own]).stage_run("reward")
        assert isinstance(run.recipe, UAE)
        newest = trained(work / arm, run)
        if not (work / f"{arm}-export").exists():
            export(find(newest), work / f"{arm}-export", "float32", without_vlm=False, forward=True)
        found.append(
            {"arm": arm, "curve": curve(work / arm), "unchanged": unchanged(newest, run.recipe.generator.weights)}
        )
        found[-1]["right"] = counted(work / f"{arm}-export", seeds)
        report(out, found, steps, seeds, rate)


def curve(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "reward" in line]


def unchanged(newest: Path, before: Path) -> bool:
    """Whether the DiT has every bit of the one that the stage began with."""
    ours, theirs = StoredTensors(newest), StoredTensors(before)
    names = [name.removeprefix("generator.") for name in ours.manifest.tensors]
    return all(bool((ours.read(f"generator.{name}") == theirs.read(name)).all()) for name in names)


def counted(export: Path, seeds: int) -> dict[str, int]:
    """Return the number of right images of each prompt."""
    file = export.parent / f"{export.name}-{seeds}.json"
    if not file.exists():
        pipe = WeMMUPipeline.from_pretrained(export)
        pipe.set_progress_bar_config(disable=True)
        made = {text: right(text, [], pipe([text] * seeds, seed=0).images) for text in PROMPTS}
        file.write_text(json.dumps(made), encoding="utf-8")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def report(out: Path, found: list[dict[str, Any]], steps: int, seeds: int, rate: float) -> None:
    """Write the table of what there is so far."""
    lines = [
        "# UAE's third stage: what Flow-GRPO does to text to image",
        "",
        f"`python -m benchmarks.uae_paths --steps {steps} --seeds {seeds} --rate {rate:g}`.",
        f"Cosines: the mean of the first and of the last five records. Prompts: right images of {seeds}",
        "by the exact scorer. `constant` is the generator as it was.",
        "",
        f"| arm | CLIP's cosine | DINOv2's | weights | {' | '.join(PROMPTS)} |",
        "|---|---|---|---|" + "---|" * len(PROMPTS),
    ]
    for run in found:
        own = "reward/own" if "reward/own" in run["curve"][0] else "reward"
        ends = []
        for name in (own, "reward/held_out"):
            values = [line[name] for line in run["curve"]]
            first, last = values[:5], values[-5:]
            ends.append(f"{sum(first) / len(first):.3f} -> {sum(last) / len(last):.3f}")
        cells = [run["arm"], *ends, "unchanged" if run["unchanged"] else "moved", *run["right"].values()]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    (out / "uae_paths.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (out / "uae_paths.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
