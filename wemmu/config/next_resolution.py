"""Stages with several resolutions: the rules that end a resolution.

The launcher runs every resolution as a job of its own, whose config (`ResolutionStep`) is a stage with one resolution.
They are not stages of their own: a stage starts with new moments and its own learning-rate schedule, counts its steps
from 0, and has a folder, a gate and an evaluation. Resolutions share one schedule, one count of steps and samples, and
one folder, so `training.resolutions` records where each began, which a plateau decides while it trains.
"""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from wemmu.config.base import Config, Positive


def record_file(stage_folder: Path) -> Path:
    """Return the file that records where each resolution of a stage ended, and why."""
    earlier = stage_folder / "rungs.jsonl"
    return earlier if earlier.exists() else stage_folder / "resolutions.jsonl"


class Plateau(Config):
    """The validation loss stops falling.

    Every `every` steps training computes the loss of the held-out records (`data.validation`) and its mean over the
    last `window` validations. The resolution ends when `patience` validations in a row do not lower the best mean by
    the share `min_gain`.
    """

    every: Positive
    window: Positive
    min_gain: Annotated[float, Field(ge=0, lt=1)]
    patience: Positive

    @property
    def fewest(self) -> int:
        """The smallest number of steps after which this rule can end a resolution."""
        return (self.window + self.patience) * self.every


class NextResolution(Config):
    """When a resolution ends; the last one ends with its stage.

    samples: the resolution ends with the step that reaches this number; one number for all or one for each. plateau:
    it ends earlier if the validation loss stops falling.
    """

    samples: Positive | tuple[Positive, ...]
    plateau: Plateau | None = None

    def limits(self, resolutions: int, global_batch: int) -> tuple[int, ...]:
        """Return the maximal number of steps of each of `resolutions` resolutions but the last.

        Raises:
            ValueError: if `samples` has the wrong length.
        """
        numbers = self.samples if isinstance(self.samples, tuple) else (self.samples,) * (resolutions - 1)
        if len(numbers) != resolutions - 1:
            raise ValueError(
                f"next_resolution.samples has {len(numbers)} numbers for {resolutions} resolutions; valid: one number, "
                f"or {resolutions - 1}, one for each resolution but the last"
            )
        return tuple(-(-number // global_batch) for number in numbers)
