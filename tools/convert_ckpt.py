"""A training checkpoint -> a directory that diffusers loads, or a small file to start training from.

    python tools/convert_ckpt.py RUN --out DIR       the newest finished stage of a run, as a pipeline
    python tools/convert_ckpt.py RUN --ship DIR      its weights alone, in float16, for `stages.NAME.start`

Instead of RUN a stage's folder or one checkpoint may be given. The pipeline is written aside, loaded from disk and
compared with the training model; it appears by rename, and only if they agree. Everything is safetensors and JSON.
"""

import json
import os
import shutil
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from wemmu.config import StageRun, load_stage
from wemmu.sample import newest_finished

PIPELINE = "WeMMUPipeline"


class Dtype(StrEnum):
    """Types in which weights can be stored."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


@dataclass(frozen=True)
class Source:
    """What is converted: a checkpoint, and the stage that wrote it into its folder."""

    run: StageRun
    folder: Path
    checkpoint: Path


def main(
    source: Annotated[Path, typer.Argument(help="RUN (its newest finished stage), RUN/STAGE, or a checkpoint.")],
    out: Annotated[Path | None, typer.Option(help="Pipeline directory; an earlier export is replaced.")] = None,
    ship: Annotated[Path | None, typer.Option(help="Directory for the weights alone, in float16.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type in which the pipeline's weights are stored.")] = Dtype.FLOAT32,
    without_vlm: Annotated[bool, typer.Option("--without-vlm", help="Leave out the VLM, which is as it was.")] = False,
    forward: Annotated[bool, typer.Option(help="Load both models and compare pictures, once all is written.")] = True,
) -> None:
    """Convert a training checkpoint."""
    if (out is None) == (ship is None):
        sys.exit("give either --out DIR, for a pipeline, or --ship DIR, for weights to start training from")
    try:
        if out is not None:
            refuse_foreign(out)
        found = find(source)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    # A bad call is refused above before torch and the models are imported.
    from tools.export.report import ParityError
    from wemmu.training.collective import CheckpointError
    from wemmu.training.stored import ship as ship_weights

    try:
        if out is not None:
            print("\n".join(export(found, out, dtype, without_vlm, forward)))
        else:
            ship_weights(found.checkpoint, ship)
            print(f"{found.checkpoint} -> {ship}")
    except (ValueError, OSError, CheckpointError, ParityError) as error:
        sys.exit(str(error))


def refuse_foreign(out: Path) -> None:
    """Raises ValueError unless `out` is free or an earlier export."""
    index = out / "model_index.json"
    earlier = index.is_file() and json.loads(index.read_text()).get("_class_name") == PIPELINE
    if out.exists() and not earlier:
        raise ValueError(f"{out} is there and is no earlier export, so it is left alone; give a name that is free")


def find(source: Path) -> Source:
    """What the argument of the command line means.

    Raises:
        ValueError: if there is no checkpoint there, or no config beside it.
    """
    if (source / "manifest.json").is_file():
        folder, checkpoint = source.resolve().parent.parent, source
    else:
        folder = source if (source / "config.yaml").is_file() else newest_finished(source)
        # Without `checkpoint.latest`, which would clear away what a trainer at work is just writing.
        whole = sorted(manifest.parent for manifest in folder.glob("checkpoints/step_*[0-9]/manifest.json"))
        if not whole:
            train = f"python -m wemmu.train {folder / 'config.yaml'}"
            raise ValueError(f"{folder} has no checkpoint; train it first: {train}")
        checkpoint = whole[-1]
    return Source(load_stage(folder / "config.yaml"), folder, checkpoint)


def export(source: Source, out: Path, dtype: str, without_vlm: bool, forward: bool) -> list[str]:
    """Write the pipeline aside, compare it with the training model, and give it its name; returns the report.

    Raises:
        ParityError: if they differ.
        CheckpointError, ValueError: if the checkpoint or a backbone cannot be loaded whole.
    """
    from tools.export.write import Choices, write_pipeline

    aside = out.with_name(f"{out.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        report = write_pipeline(
            source.run, source.folder, source.checkpoint, aside, Choices(dtype, without_vlm, forward)
        )
        _replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return [f"{source.checkpoint} -> {out}, stored in {dtype}", *report]


def _replace(aside: Path, out: Path) -> None:
    """Give `aside` the name `out`, in place of an earlier export."""
    earlier = out.with_name(f"{out.name}.earlier.tmp")
    shutil.rmtree(earlier, ignore_errors=True)
    if out.exists():
        os.replace(out, earlier)
    os.replace(aside, out)
    shutil.rmtree(earlier, ignore_errors=True)


if __name__ == "__main__":
    typer.run(main)
