"""What the studies of the miniature share: data and stages that are made once and kept."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.measure import ROOT
from wemmu.checkpoint import retention
from wemmu.checkpoint.stored import StoredTensors
from wemmu.config import StageRun, dump
from wemmu.training.trainer import Trainer


def write_data(config: Path, overrides: Iterable[str] = ()) -> None:
    """Write the data set of a curriculum, or find it there."""
    words = [word for one in overrides for word in ("--set", one)]
    subprocess.run([sys.executable, "-m", "wemmu", "data", "write", str(config), *words], cwd=ROOT, check=True)


def trained(folder: Path, run: StageRun) -> Path:
    """Train a stage, or go on with it; return its last checkpoint. A signal ends the program, and all is saved."""
    folder.mkdir(exist_ok=True)
    if not (folder / "done").exists():
        dump(run, folder / "config.yaml")
        if code := Trainer(run, folder).train():
            sys.exit(code)
        (folder / "done").touch()
    newest = retention.latest(folder / "checkpoints")
    assert newest is not None, "it has just been trained"
    return newest


def unchanged(checkpoint: Path, before: Path, prefix: str = "") -> bool:
    """Whether a checkpoint has every bit of the weights `before`, whose names lack `prefix`."""
    now, then = StoredTensors(checkpoint), StoredTensors(before)
    names = [name.removeprefix(prefix) for name in now.manifest.tensors]
    return all(torch.equal(now.read(prefix + name), then.read(name)) for name in names)
