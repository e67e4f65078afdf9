"""A training checkpoint -> a directory that diffusers loads, or a small file to start training from.

    python tools/convert_ckpt.py RUN --out DIR       the newest finished stage of a run, as a pipeline
    python tools/convert_ckpt.py RUN --ship DIR      its weights alone, in float16, for `stages.NAME.start`

Instead of RUN a stage's folder or one checkpoint may be given. The pipeline is written aside, loaded from disk, compared
with the training model tensor by tensor and picture by picture, and appears by rename only if both agree. Everything is
safetensors and JSON.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from wemmu.config import StageRun, load_stage
from wemmu.sample import newest_finished

PIPELINE = "WeMMUPipeline"
# Largest difference of any pixel, in [0, 1], between the training model and the export. Both compute in float32 with
# equal weights, so only the order of sums could differ.
BOUND = 1e-5
# diffusers runs this file when it is told custom_pipeline=DIR.
PIPELINE_FILE = f'"""Lets diffusers find the pipeline; the wemmu package must be installed."""\n\nfrom wemmu.pipeline import {PIPELINE}\n\n__all__ = ["{PIPELINE}"]\n'


class Dtype(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class ExportError(RuntimeError):
    """The checkpoint cannot be exported; nothing was left behind."""


@dataclass(frozen=True)
class Source:
    """What is converted: a checkpoint, and the stage that wrote it."""

    run: StageRun
    folder: Path
    checkpoint: Path


def main(
    source: Annotated[Path, typer.Argument(help="RUN (its newest finished stage), RUN/STAGE, or a checkpoint.")],
    out: Annotated[Path | None, typer.Option(help="Pipeline directory to write; replaces an earlier export.")] = None,
    ship: Annotated[Path | None, typer.Option(help="Directory for the weights alone, in float16.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type in which the pipeline's weights are stored.")] = Dtype.float32,
    without_vlm: Annotated[bool, typer.Option("--without-vlm", help="Leave out the VLM, which is as published.")] = False,
) -> None:
    """Convert a training checkpoint."""
    if (out is None) == (ship is None):
        sys.exit("give either --out DIR (a pipeline) or --ship DIR (weights to start training from)")
    if out is not None:
        refuse_foreign(out)
    # A bad call is refused above before torch and the models are imported.
    from wemmu.training.checkpoint import CheckpointError
    from wemmu.training.checkpoint import ship as ship_weights

    try:
        found = find(source)
        if ship is not None:
            ship_weights(found.checkpoint, ship)
            print(f"{found.checkpoint} -> {ship}")
        else:
            export(found, out, dtype, without_vlm)
    except (ValueError, OSError, CheckpointError, ExportError) as error:
        sys.exit(str(error))


def refuse_foreign(out: Path) -> None:
    """Exit unless `out` is free or an earlier export."""
    index = out / "model_index.json"
    earlier = index.is_file() and json.loads(index.read_text()).get("_class_name") == PIPELINE
    if out.exists() and not earlier:
        sys.exit(f"{out} exists and is not an earlier export; give a directory that does not exist or is one")


def find(source: Path) -> Source:
    """Resolve the argument of the command line.

    Raises:
        ValueError: if there is no checkpoint there, or no config beside it.
    """
    if (source / "manifest.json").is_file():
        folder, checkpoint = source.resolve().parent.parent, source
    else:
        folder = source if (source / "config.yaml").is_file() else newest_finished(source)
        whole = sorted(manifest.parent for manifest in folder.glob("checkpoints/step_*[0-9]/manifest.json"))
        if not whole:
            raise ValueError(f"{folder} has no checkpoint; train it first: python -m wemmu.train {folder / 'config.yaml'}")
        checkpoint = whole[-1]
    return Source(load_stage(folder / "config.yaml"), folder, checkpoint)


def export(source: Source, out: Path, dtype: str, without_vlm: bool) -> None:
    """Write, compare, and give the directory its name.

    Raises:
        ExportError: if what was written differs from the training model.
    """
    import torch

    from wemmu.training.build import load_trained

    if source.run.threads is not None:
        torch.set_num_threads(source.run.threads)
    # Compared in float32, whatever the backbones trained in.
    backbones = source.run.backbones.model_copy(update={"dtype": "float32"})
    model, encoder = load_trained(source.run.model_copy(update={"backbones": backbones}), source.checkpoint)
    aside = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        trained = pictures_of_training(source, model, encoder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(parameter.to(getattr(torch, dtype)))
        expected = trained if dtype == Dtype.float32 else pictures_of_training(source, model, encoder)
        tensors = {name: inventory(part) for name, part in parts(model, source.run).items()}
        write(source, model, aside, dtype, without_vlm)
        # Two copies of the model at a time are never needed.
        del model
        report = [f"{source.checkpoint} -> {out}, stored in {dtype}"]
        report += compare_tensors(aside, tensors)
        vlm = source.run.backbones.vlm if without_vlm else None
        report += compare_pictures(aside, vlm, source.run.stage.resolution, expected, trained)
        from wemmu.training.checkpoint import read_manifest

        card = model_card(source, read_manifest(source.checkpoint), report, without_vlm)
        (aside / "README.md").write_text(card)
        put(aside, out)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    print("\n".join(report))
