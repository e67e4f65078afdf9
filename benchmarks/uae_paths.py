"""What does UAE's third stage do to text to image? Flow-GRPO on the miniature's generator, which is weak at relations.

    OMP_NUM_THREADS=1 python -m benchmarks.uae_paths --work runs/uae-paths --steps 60

The generator draws captions of the data set that tell the place of one object by the other; CLIP's cosine of image and
scene rewards it, DINOv2 watches. Arms: `reward`; `deranged`, rewarded by another image; `constant`, rewarded for
nothing, whose weights must keep every bit. Before and after, `--seeds` images of each prompt are read by the exact
scorer. `--work` keeps the runs; run again, it goes on.
"""

import json
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer

from benchmarks.measure import RESULTS, Out, save, table
from benchmarks.prompts import right
from benchmarks.study import trained, unchanged, write_data
from benchmarks.uae import ARMS, CONFIG, curves
from tools.convert_ckpt import export, find
from wemmu.config import load_curriculum
from wemmu.pipeline import WeMMUPipeline
from wemmu.recipes.uae.config import UAE

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
    write_data(CONFIG, shared)
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
        same = unchanged(newest, run.recipe.generator.weights, "generator.")
        right_ones = counted(work / f"{arm}-export", seeds)
        found.append({"arm": arm, "curves": curves(work / arm), "unchanged": same, "right": right_ones})
        report(out, found, seeds)


def counted(export: Path, seeds: int) -> dict[str, int]:
    """Return the number of right images of each prompt."""
    file = export.parent / f"{export.name}-{seeds}.json"
    if not file.exists():
        pipe = WeMMUPipeline.from_pretrained(export)
        pipe.set_progress_bar_config(disable=True)
        made = {text: right(text, [], pipe([text] * seeds, seed=0).images) for text in PROMPTS}
        file.write_text(json.dumps(made), encoding="utf-8")
    return dict(json.loads(file.read_text(encoding="utf-8")))


def report(out: Path, found: list[dict[str, Any]], seeds: int) -> None:
    """Write the table of what there is so far."""
    lines = [
        "What Flow-GRPO, UAE's third stage, does to text to image. Cosines: the mean of the first and of the last five",
        f"records. Prompts: right images of {seeds} by the exact scorer. `constant` is the generator as it was.",
        "",
    ]
    rows = []
    for run in found:
        of = run["curves"]
        cosines = (of.get("reward/own", of["reward"]), of["reward/held_out"])
        ends = [f"{mean(one[:5]):.3f} -> {mean(one[-5:]):.3f}" for one in cosines]
        rows.append([run["arm"], *ends, "unchanged" if run["unchanged"] else "moved", *run["right"].values()])
    lines += table(["arm", "CLIP's cosine", "DINOv2's", "weights", *PROMPTS], rows)
    save(out, "uae_paths", lines, found)


if __name__ == "__main__":
    typer.run(main)
