"""Does it help a VLM to answer if it must also restore the image? The same runs with and without that loss.

    OMP_NUM_THREADS=1 python -m benchmarks.ross OUT --seeds 2      # some 25 minutes for each seed

The start is the shipped VLM with a new projector: a language model that knows its words, a vision tower that sees, and
nothing between them, as where LLaVA's recipe begins. Both runs of a seed see the same questions in the same order, and
are asked the same held-out ones. OUT keeps the run folders and `ross.json`; run again, it goes on.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from wemmu.config import load_curriculum

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "configs" / "shapes" / "ross.yaml"
WEIGHTS = (0.0, 1.0)
# (heading, split, measure, group or all)
COLUMNS = (
    ("descriptions", "test", "right", "description"),
    ("questions", "test", "right", "question"),
    ("descriptions, new pairs", "composition", "right", "description"),
    ("questions, new pairs", "composition", "right", "question"),
    ("restored", "test", "restored", None),
)


def main(
    out: Annotated[Path, typer.Argument(help="Where runs and results go.")],
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of runs.")] = 2,
    overrides: Annotated[list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Of every run.")] = None,
) -> None:
    """Train, score and tell."""
    out.mkdir(parents=True, exist_ok=True)
    start = new_projector(out / "vlm")
    found: list[dict[str, Any]] = []
    for seed in range(seeds):
        for weight in WEIGHTS:
            folder = out / f"seed{seed}-weight{weight:g}"
            train(folder, start, out, seed, weight, overrides or [])
            last = load_curriculum(folder / "curriculum.yaml").stages[-1].name
            scores = json.loads((folder / last / "evaluation.json").read_text(encoding="utf-8"))["tasks"][
                "understanding"
            ]
            found.append({"seed": seed, "weight": weight, "scores": scores})
            (out / "ross.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
            Console().print(table(found))


def new_projector(folder: Path) -> Path:
    """The shipped VLM with a projector drawn anew."""
    if (folder / "config.json").is_file():
        return folder
    source = load_curriculum(CONFIG).backbones.vlm
    vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(source)
    generator = torch.Generator().manual_seed(0)
    for layer in vlm.model.visual.merger.modules():
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
            torch.nn.init.zeros_(layer.bias)
    AutoProcessor.from_pretrained(source, use_fast=True).save_pretrained(folder)
    vlm.save_pretrained(folder)
    return folder


def train(folder: Path, start: Path, out: Path, seed: int, weight: float, overrides: list[str]) -> None:
    """A run of the whole chain, which says on the terminal how it goes on."""
    fields = {
        "backbones.vlm": start,
        "data.shards": out / "data",
        "seed": seed,
        "stages.*.objective.weight": weight,
        "logging.wandb": "disabled",
    }
    words = [f"{field}={value}" for field, value in fields.items()] + overrides
    command = [sys.executable, "-m", "launcher", "run", CONFIG, "--out", folder]
    command += [part for word in words for part in ("--set", word)]
    subprocess.run(list(map(str, command)), cwd=ROOT, env=dict(os.environ), check=True)


def shares(scores: dict[str, Any]) -> Iterator[dict[str, float]]:
    for _, split, measure, group in COLUMNS:
        part = scores[split]
        yield (part["by"][group] if group else part["measures"])[measure]


def table(found: list[dict[str, Any]]) -> Table:
    """A row for each run."""
    made = Table(title="held-out requests right, of those of their kind")
    for heading in ("seed", "weight", *(column[0] for column in COLUMNS)):
        made.add_column(heading, justify="right")
    for one in found:
        cells = [f"{share['successes']}/{share['count']}" for share in shares(one["scores"])]
        made.add_row(str(one["seed"]), f"{one['weight']:g}", *cells)
    return made


if __name__ == "__main__":
    typer.run(main)
