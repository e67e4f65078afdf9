"""What a run says of itself: metrics.jsonl is the record, the terminal and W&B are views of it."""

import json
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from wemmu.config.files import replace_text
from wemmu.config.schema import StageRun
from wemmu.parallel.topology import gathered


class Window:
    """Sums over the steps since the last line of the record."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.samples = self.steps = 0
        self.waited = 0.0
        self._sums: dict[str, tuple[float, int]] = {}

    def add(self, key: str, values: torch.Tensor) -> None:
        """Add per-sample values [n] to the mean of `key`."""
        total, count = self._sums.get(key, (0.0, 0))
        self._sums[key] = total + float(values.sum()), count + len(values)

    def means(self) -> dict[str, float]:
        """Mean of each key over the samples of all ranks, which must all ask."""
        totals: dict[str, tuple[float, int]] = {}
        for sums in gathered(self._sums):
            for key, (total, count) in sums.items():
                before = totals.get(key, (0.0, 0))
                totals[key] = before[0] + total, before[1] + count
        return {key: total / count for key, (total, count) in totals.items() if count}


class Record:
    """The file metrics.jsonl of a run folder, one JSON object a line, appended."""

    def __init__(self, file: Path, resumed_at: int):
        """Forget what a run that was killed wrote after the checkpoint it is now resumed from."""
        self._file = file
        if file.exists():
            kept = [line for line in file.read_text().splitlines() if _step(line) <= resumed_at]
            replace_text(file, "".join(line + "\n" for line in kept))

    def write(self, values: dict[str, Any]) -> None:
        with self._file.open("a") as stream:
            stream.write(json.dumps(values) + "\n")


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line cut short by a kill


class WandB:
    """A view of the record in Weights & Biases, which can never stop or slow the run: any failure ends the view."""

    def __init__(self, run: StageRun, folder: Path):
        self._run: Any = None
        if run.logging.wandb == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            self._run = wandb.init(
                project=run.logging.wandb_project,
                group=run.name,
                name=f"{run.name}/{run.stage.name}",
                id=self._stored_id(folder),
                resume="allow" if run.logging.wandb == "online" else None,
                mode=run.logging.wandb,
                dir=folder,
                config=run.model_dump(mode="json"),
                settings=wandb.Settings(init_timeout=30, x_disable_stats=True, console="off"),
            )
            self._run.define_metric("*", step_metric="step")
        except Exception as error:
            self._end(error)

    @staticmethod
    def _stored_id(folder: Path) -> str:
        """The id is made once and kept in the run folder, so that a resumed job continues its own W&B run."""
        file = folder / "wandb_id"
        if not file.exists():
            file.write_text(os.urandom(6).hex())
        return file.read_text()

    def log(self, values: dict[str, Any], pictures: Path | None = None) -> None:
        if self._run is None:
            return
        try:
            import wandb

            self._run.log(values | ({"samples": wandb.Image(str(pictures))} if pictures else {}))
        except Exception as error:
            self._end(error)

    def finish(self) -> None:
        if self._run is not None:
            try:
                self._run.finish()
            except Exception as error:
                self._end(error)

    def _end(self, error: Exception) -> None:
        warnings.warn(
            f"W&B is not available, the run goes on without it: {type(error).__name__}: {error}", stacklevel=3
        )
        self._run = None


def progress_line(stage: str, step: int, steps: int, means: dict[str, float], rate: float, samples_per_s: float) -> str:
    """One line for a person: where, how well, how fast, how long."""
    left = (steps - step) / rate if rate else float("inf")
    tasks = "  ".join(
        f"{k.removeprefix('loss/')} {v:.3f}" for k, v in means.items() if k.startswith("loss/") and "t_" not in k
    )
    return (
        f"{stage}  step {step}/{steps}  loss {means['loss']:.4f}  ({tasks})  {samples_per_s:.0f} samples/s  "
        f"{_duration(left)} left"
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
