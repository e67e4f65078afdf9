"""Converts weights. Never unpickles anything that could run code.

    wemmu export RUN --out DIR        the newest finished stage of a run -> a pipeline for diffusers, or, of
                                      stages that tune a VLM, a VLM for transformers
    wemmu export RUN --adapters DIR   the adapters (LoRA) alone, a folder of peft for each module
    wemmu export RUN --ship DIR       its weights alone, in float16, for `stages.NAME.start`
    wemmu export PIPELINE --ship DIR  the same, of a pipeline that was exported
    wemmu export FOLDER --stage RUN/STAGE --checkpoint DIR
                                      a folder of DeepSpeed (ZeRO-1, 2, 3, universal) or FSDP (DCP) -> a checkpoint

`python tools/convert_ckpt.py` is the same.

Instead of RUN you may give a stage's folder or one checkpoint. A pipeline is written under another name, read again,
compared with the checkpoint tensor by tensor, then loaded and compared image by image, and renamed into place.
parity.json in it records the comparison.
"""

import ctypes
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import typer

from tools.export import replacing
from wemmu.command_line import Ema, UsageError, plainly, program, start, without_unused
from wemmu.config import StageRun, load_stage
from wemmu.config.checkpoints import check_adapters, check_averages, newest_checkpoint, stage_folder
from wemmu.config.files import nearest


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


@plainly()
def main(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="RUN, RUN/STAGE, a checkpoint, a pipeline, or another framework's folder."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="PIPELINE", help="Pipeline to write; replaces only an earlier export.")
    ] = None,
    ship: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder to write weights to, for stages.NAME.start.")
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="New folder to write the LoRA adapters to, for peft and diffusers."),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder to write a checkpoint to; SOURCE is a DeepSpeed or FSDP folder."),
    ] = None,
    stage: Annotated[
        Path | None,
        typer.Option(metavar="RUN/STAGE", help="Stage whose config defines the model of the DeepSpeed or FSDP folder."),
    ] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(
            metavar="OLD=NEW", help="With --checkpoint: replace a prefix of parameter names; OLD=- drops them."
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Type of the written weights; default: float32; with --ship: float16.")
    ] = None,
    without_vlm: Annotated[
        bool, typer.Option("--without-vlm", help="Leave out the weights of the frozen VLM.")
    ] = False,
    ema: Ema = None,
    forward: Annotated[bool | None, typer.Option(help="Compare images of checkpoint and export; default: yes.")] = None,
) -> None:
    """Export a diffusers pipeline, or convert weights. Give one of --out, --ship, --adapters, --checkpoint."""
    return_what_is_freed()
    targets = {"--out": out, "--ship": ship, "--adapters": adapters, "--checkpoint": checkpoint}
    chosen = [name for name, path in targets.items() if path is not None]
    if len(chosen) != 1:
        raise UsageError(
            "give one of --out DIR (a pipeline), --ship DIR (weights to start from), --adapters DIR (LoRA), "
            "--checkpoint DIR (DeepSpeed, FSDP)"
        )
    (target,) = chosen
    if (checkpoint is None) != (stage is None):
        raise UsageError(
            "--checkpoint DIR and --stage RUN/STAGE go together: the stage says what another framework's folder holds"
        )
    # What each target has a use for.
    uses = {
        "--dtype": (dtype, ("--out", "--ship")),
        "--without-vlm": (without_vlm or None, ("--out",)),
        "--forward/--no-forward": (forward, ("--out",)),
        "--rename": (rename or None, ("--checkpoint",)),
        "--ema/--no-ema": (ema, ("--out", "--ship", "--adapters")),
    }
    for option, (given, kinds) in uses.items():
        if given is not None and target not in kinds:
            raise UsageError(f"{option} has no effect with {target}; it is for {', '.join(kinds)}")
    table = parse_table(rename or [])
    path = targets[target]
    assert path is not None, "it was given"
    if (place := nearest(path)) != path and not place.is_dir():
        raise UsageError(f"{target} {path} cannot be written: {place} is a file; give another name")
    if out is not None:
        replacing.check_export(out)
    if ship is not None:
        replacing.check_shipped(ship, source)
    if adapters is not None and adapters.exists():
        raise UsageError(f"{adapters} exists; give another name")
    pipeline = replacing.is_pipeline(source)
    if pipeline and ship is None:
        raise UsageError(f"{source} is already a pipeline; --ship DIR writes its weights, to start a stage from")
    found = None if pipeline or checkpoint is not None else find(source)
    if found is None and ema is not None:
        raise UsageError(f"--ema is for a checkpoint of a run, which {source} is not")
    if found is not None:
        check_averages(found.checkpoint, found.run.stage.averages(ema))
        if without_vlm and found.run.recipe.export_of(found.run.stage) == "vlm":
            raise UsageError(f"--without-vlm is for a pipeline; {source} is exported as a VLM")
        if adapters is not None:
            check_adapters(found.checkpoint)
    # What is wrong so far is said before torch and the models are imported.
    if out is not None:
        assert found is not None
        lines = export(found, out, dtype or Dtype.FLOAT32, without_vlm, forward is not False, ema)
    elif adapters is not None:
        assert found is not None
        lines = _adapters(found, adapters, ema)
    elif ship is not None:
        lines = _ship(source, found, ship, dtype or Dtype.FLOAT16, ema)
    else:
        assert stage is not None
        assert checkpoint is not None
        lines = _import(source, load_stage(stage / "config.yaml"), checkpoint, table)
    print("\n".join(lines))


def return_what_is_freed() -> None:
    """Keep glibc's threshold, from which on memory is mapped and given back, where it is at first: at 128 KiB.

    It rises with each larger tensor that is freed. From then on tensors of that size lie in the heap, aligned: a freed
    one may be a few bytes too small for the next of its size, and by chance everything converted piles up.
    """
    if platform.libc_ver()[0] == "glibc":
        m_mmap_threshold = -3  # <malloc.h>
        ctypes.CDLL(None).mallopt(m_mmap_threshold, 128 * 1024)


def _ship(source: Path, found: Source | None, out: Path, dtype: str, ema: bool | None) -> list[str]:
    """Ship the weights of a checkpoint, or of a pipeline if there is no `found`."""
    import torch

    from wemmu.checkpoint.stored import export_weights

    directory, averaged = (source, False) if found is None else (found.checkpoint, found.run.stage.averages(ema))
    with replacing.aside(out) as aside:
        export_weights(directory, aside, getattr(torch, dtype), averaged)
    return [f"{_named(directory, averaged)} -> {out}, stored in {dtype}"]


def _adapters(found: Source, out: Path, ema: bool | None) -> list[str]:
    from tools.export.adapters import write_adapters

    averaged = found.run.stage.averages(ema)
    with replacing.aside(out) as directory:
        lines = write_adapters(found.run, found.checkpoint, directory, averaged)
    return [f"the adapters of {_named(found.checkpoint, averaged)} -> {out}", *lines]


def _named(checkpoint: Path, averaged: bool) -> str:
    return f"the average (EMA) in {checkpoint}" if averaged else str(checkpoint)


def _import(source: Path, run: StageRun, root: Path, table: dict[str, str]) -> list[str]:
    from tools.foreign import fsdp
    from tools.foreign.checkpoint import write_checkpoint
    from tools.foreign.zero import folder as zero

    for holds, read_folder in ((zero.is_folder, zero.read_folder), (fsdp.indices, fsdp.read_folder)):
        if holds(source):
            return write_checkpoint(read_folder(source), run, root, table)
    inside = sorted(str(path) for path in source.glob("*") if zero.is_folder(path) or fsdp.indices(path))
    raise ValueError(
        f"{source} is neither a DeepSpeed folder (*_model_states.pt, latest) nor an FSDP folder (.metadata)"
        + (f"; meant may be one of those inside: {', '.join(inside)}" if inside else "")
    )


def parse_table(entries: Iterable[str]) -> dict[str, str]:
    """Parse `OLD=NEW` entries into {OLD: NEW}; see `rename`.

    Raises:
        ValueError: if an entry is none, or names a prefix twice.
    """
    table: dict[str, str] = {}
    for entry in entries:
        old, equals, new = entry.partition("=")
        if not equals or old in table:
            raise UsageError(f"--rename {entry!r} is not OLD=NEW with a new OLD; for example model.bridge.=bridge.")
        table[old] = new
    return table


def find(source: Path) -> Source:
    """Return what the command line's argument names.

    Raises:
        ValueError: if there is no checkpoint there, or no config beside it.
    """
    if (source / "manifest.json").is_file():
        folder, checkpoint = source.resolve().parent.parent, source
    else:
        folder = stage_folder(source)
        checkpoint = newest_checkpoint(folder)
    return Source(load_stage(folder / "config.yaml"), folder, checkpoint)


def export(
    source: Source, out: Path, dtype: str, without_vlm: bool, forward: bool, ema: bool | None = None
) -> list[str]:
    """Write the export aside, compare it with the training model, and give it its name; returns the report.

    ema: whether of the moving averages of the weights; None: if the stage keeps them.

    Raises:
        ParityError: if they differ.
        CheckpointError, ValueError: if the checkpoint or a backbone cannot be loaded whole.
    """
    with without_unused():
        from tools.export.generator import as_wemmu
        from tools.export.pipeline import Choices, write_pipeline
        from tools.export.vlm import write_vlm

    run, averaged = source.run, source.run.stage.averages(ema)
    with replacing.aside(out) as aside, TemporaryDirectory(prefix=f"{aside.name}.", dir=aside.parent) as work:
        choices = Choices(dtype, without_vlm, forward, averaged)
        kind = run.recipe.export_of(run.stage)
        if kind == "pipeline":
            report = write_pipeline(run, source.folder, source.checkpoint, aside, choices)
        elif kind == "generator":
            # The weights that `as_wemmu` returns are the averages already.
            generator, weights = as_wemmu(run, source.checkpoint, Path(work), averaged)
            report = write_pipeline(generator, source.folder, weights, aside, replace(choices, ema=False))
        else:
            report = write_vlm(run, source.checkpoint, aside, dtype, forward, averaged, source.folder)
        replacing.note_files(aside)
    return [f"{_named(source.checkpoint, averaged)} -> {out}, stored in {dtype}", *report]


if __name__ == "__main__":
    start(program(main))
