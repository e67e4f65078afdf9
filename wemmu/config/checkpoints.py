"""Finds a stage's checkpoints by one rule for resuming, pruning, scoring, sampling and export.

A checkpoint is a real directory `step_` plus eight digits whose manifest names the same step. A user's other files
(copies under other names, links, archives) are never used and never changed. Free of torch.
"""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wemmu.config.base import ConfigError
from wemmu.config.load import load_stage, load_stages
from wemmu.config.schema import StageRun
from wemmu.readable import namesake

CHECKPOINTS, MANIFEST = "checkpoints", "manifest.json"
_NAME = re.compile(r"step_(\d{8})")
_DEBRIS = re.compile(_NAME.pattern + r"(\.old|\.import)?\.tmp")


class RenamedError(ConfigError):
    """A directory named like a checkpoint holds the checkpoint of another step."""


def no_checkpoint(folder: Path) -> ConfigError:
    """Return the error for a stage's folder without a checkpoint."""
    train = f"wemmu train {shlex.quote(str(folder / 'config.yaml'))}"
    return ConfigError(f"{folder} has no checkpoint; train it first: {train}")


def newest_checkpoint(folder: Path) -> Path:
    """Return the newest checkpoint of a stage's folder, whose files are not read yet.

    Raises:
        ConfigError: if it has none. RenamedError: as `refuse_renamed`.
    """
    refuse_renamed(folder / CHECKPOINTS)
    if not (found := own_checkpoints(folder / CHECKPOINTS)):
        raise no_checkpoint(folder)
    return found[-1]


def no_averages(checkpoint: Path) -> str:
    """Return what to say of a checkpoint without moving averages."""
    return (
        f"{checkpoint} holds no moving average of the weights (EMA): optimizer.ema_decay was not set when it was "
        "saved, or `wemmu export --ship` wrote it; --no-ema uses the weights"
    )


def check_averages(checkpoint: Path, averaged: bool) -> None:
    """Raise ConfigError if moving averages are to be used and the manifest says that there are none."""
    manifest = stated(checkpoint)
    if averaged and manifest is not None and not manifest.get("ema"):
        raise ConfigError(no_averages(checkpoint))


def check_adapters(checkpoint: Path) -> None:
    """Raise ConfigError if the manifest says that there are no adapters."""
    manifest = stated(checkpoint)
    if manifest is not None and not manifest.get("adapters"):
        raise ConfigError(no_adapters(checkpoint))


def no_adapters(checkpoint: Path) -> str:
    """Return what to say of a checkpoint without adapters."""
    return f"{checkpoint} holds no adapters (recipe.lora); `wemmu export RUN --out DIR` writes whole weights"


def stage_folder(source: Path) -> Path:
    """Return the folder of a stage: `source`, or the last finished stage of the run folder `source`.

    Raises:
        ConfigError: if `source` is neither, or none of its stages is finished.
    """
    if (source / "config.yaml").is_file():
        return source
    stages = load_stages(source)
    if not stages:
        raise not_a_run(source)
    for folder, config in reversed(stages):
        if says_its_step(folder / CHECKPOINTS / directory_name(config.stage.steps)):
            return folder
    begun = [str(folder) for folder, _ in stages if own_checkpoints(folder / CHECKPOINTS)]
    choices = f"; name one that is not finished: {', '.join(begun)}" if begun else ""
    raise ConfigError(f"no stage of {source} is finished{choices}")


def trained_stage(source: Path, ema: bool | None, checkpoint: Path | None = None) -> tuple[Path, StageRun]:
    """Return the folder of a stage, as `stage_folder`, and its config. checkpoint: the one to use; None: the newest.

    Raises:
        ConfigError: as `stage_folder`, `newest_checkpoint` and `check_checkpoint`, or if `ema` asks for averages and
            there are none.
    """
    folder = stage_folder(source)
    run = load_stage(folder / "config.yaml")
    if checkpoint is not None:
        check_checkpoint(checkpoint, folder)
    check_averages(checkpoint or newest_checkpoint(folder), run.stage.averages(ema))
    return folder, run


def not_a_run(source: Path) -> ConfigError:
    """Return the error for a folder that is neither a run nor a stage."""
    beside = {file.parent for name in ("config", "curriculum") for file in source.parent.glob(f"*/{name}.yaml")}
    question = "".join(f"did you mean {one}? " for one in namesake(source, beside))
    return ConfigError(
        f"{source} is not a run; {question}valid choices: a run folder (it holds STAGE/config.yaml), a stage's "
        "folder (config.yaml) or, to sample from it, an exported model (model_index.json)"
    )


def check_checkpoint(checkpoint: Path, folder: Path) -> None:
    """Raise ConfigError if the folder is no checkpoint; lists those of the stage in `folder`."""
    if not (checkpoint / MANIFEST).is_file():
        choices = ", ".join(map(str, own_checkpoints(folder / CHECKPOINTS))) or "none"
        raise ConfigError(f"--checkpoint {checkpoint} is not a checkpoint: it has no {MANIFEST}; valid: {choices}")


def directory_name(step: int) -> str:
    return f"step_{step:08d}"


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint or of a sheet of samples."""
    return int(path.stem.removeprefix("step_"))


def sheet(folder: Path, step: int) -> Path:
    """Return the image of the fixed prompts that the stage in `folder` draws at `step`."""
    return folder / "samples" / f"{directory_name(step)}.png"


def sheets(folder: Path) -> list[Path]:
    """Return the sheets of the stage in `folder`, oldest first."""
    return sorted(f for f in _entries(folder / "samples") if _NAME.fullmatch(f.stem) and f.suffix == ".png")


def debris(root: Path) -> list[Path]:
    """Return what a killed save or import left under `root`."""
    return [path for path in _entries(root) if _DEBRIS.fullmatch(path.name)]


def own_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoints under `root`, oldest first, including those with an unreadable manifest."""
    return [d for d in _named(root) if manifest_step(d) in (step_of(d), None)]


def stand_ins(root: Path) -> list[Path]:
    """Return links and files under `root` that are named like a checkpoint; they are not used."""
    return sorted(d for d in _entries(root) if _NAME.fullmatch(d.name) and (d.is_symlink() or not d.is_dir()))


def refuse_renamed(root: Path) -> None:
    """Raise RenamedError if a directory under `root` holds another step than its name says."""
    for directory in _named(root):
        if (step := manifest_step(directory)) not in (step_of(directory), None):
            raise RenamedError(
                f"{directory} holds the checkpoint of step {step}: it was renamed or copied. Rename it to "
                f"{directory_name(step)}, or to a name of another form, such as {directory.name}_kept"
            )


def stated(directory: Path) -> dict[str, Any] | None:
    """Return the fields of the manifest of `directory`, without a look at its files; None if it is unreadable."""
    try:
        found = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def manifest_step(directory: Path) -> int | None:
    """Return the step in the manifest of `directory`; None if it is unreadable."""
    step = (stated(directory) or {}).get("step")
    return step if isinstance(step, int) else None


def says_its_step(directory: Path) -> bool:
    """Return whether the manifest of `directory` has the step of the folder's name."""
    return directory_name(manifest_step(directory) or 0) == directory.name


def _named(root: Path) -> list[Path]:
    return sorted(d for d in _entries(root) if _NAME.fullmatch(d.name) and d.is_dir() and not d.is_symlink())


def _entries(root: Path) -> Iterator[Path]:
    return root.iterdir() if root.is_dir() else iter(())
