"""Ends a resolution of a stage with several.

`resolutions.jsonl` in the stage's folder has a line for each resolution that ended, written after its last checkpoint:

    resolution            px; `next`: the next resolution's, null after the last
    from_step, to_step    the resolution's steps, counted in the stage; `samples`: the samples of these steps
    rule                  samples, plateau or steps (the end of the stage)
    reason, numbers       why it ended, in words, and the inputs of the rule

A rule depends on the step and on the resolution's validation losses, which metrics.jsonl holds up to every checkpoint.
So a killed run that resumes ends its resolutions at the same steps as an undisturbed run.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from wemmu.checkpoint.collective import CheckpointError
from wemmu.config import ResolutionStep
from wemmu.config.files import sync
from wemmu.config.next_resolution import Plateau, record_file
from wemmu.jsonlines import read_lines, write_lines
from wemmu.parallel.topology import gathered

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Ending:
    """Why a resolution ends."""

    rule: Literal["samples", "plateau", "steps"]
    reason: str
    numbers: dict[str, float]


def plateau(losses: Sequence[float], rule: Plateau) -> Ending | None:
    """Return the end of a resolution with these validation losses, oldest first; None if they still fall."""
    best, since, mean = math.inf, 0, math.inf
    for end in range(rule.window, len(losses) + 1):
        mean = sum(losses[end - rule.window : end]) / rule.window
        best, since = (mean, 0) if mean < best * (1 - rule.min_gain) else (best, since + 1)
    if since < rule.patience:
        return None
    reason = (
        f"the validation loss, {mean:.5f} as the mean of {rule.window}, has not come {rule.min_gain:.2%} below its "
        f"best of {best:.5f} in {since} validations"
    )
    return Ending("plateau", reason, {"best": best, "mean": mean, "since": since, "validations": len(losses)})


class ResolutionSchedule:
    """When the resolution that a job trains begins and ends; the leading rank reads and writes the record.

    All ranks create one and make the same calls. A stage with one resolution ends with its steps and has no record.
    """

    def __init__(self, stage: ResolutionStep, folder: Path, leads: bool):
        """Raise CheckpointError on all ranks if the previous resolution has not ended."""
        self.stage, self._file, self._metrics, self._leads = stage, record_file(folder), folder / METRICS, leads
        self._losses: list[float] = []
        lower = stage.resolutions[: stage.resolutions.index(stage.resolution)] if stage.resolutions else ()
        lines: list[dict[str, Any]] = gathered(read_lines(self._file) if leads else None)[0]
        ended = {line["resolution"]: line for line in lines}
        if lower and lower[-1] not in ended:
            raise CheckpointError(
                f"{folder}: the resolution of {lower[-1]} px has not ended, so {stage.resolution} px cannot begin; run "
                f"{stage.name}@{lower[-1]} first"
            )
        self._below = [ended[resolution] for resolution in lower]
        self._own = ended.get(stage.resolution)
        self.begin = int(self._below[-1]["to_step"]) if lower else 0

    def go_on(self, step: int) -> None:
        """Start at `step`, the newest checkpoint's; drop lines that were written after it.

        Raises:
            CheckpointError: on all ranks, if the checkpoint is of an earlier one or validation losses are missing.
        """
        if step < self.begin:
            raise CheckpointError(
                f"{self._file}: the resolution of {self._below[-1]['resolution']} px ended at step {self.begin}, but "
                f"the newest whole checkpoint is of step {step}; remove what is damaged among the checkpoints and run "
                f"{self.stage.name}@{self._below[-1]['resolution']} again"
            )
        if self._own is not None and self._own["to_step"] > step:
            self._own = None
            if self._leads:
                write_lines(self._file, self._below)
        if self._own is None and self._plateau is not None:
            self._losses = gathered(self._recorded(step, self._plateau.every) if self._leads else None)[0]
            if len(self._losses) < (expected := (step - self.begin) // self._plateau.every):
                raise CheckpointError(
                    f"{self._metrics} has {len(self._losses)} validation losses of steps {self.begin} to {step}, not "
                    f"{expected}; the end of the resolution follows from them: put the file back, or remove the "
                    f"checkpoints later than step {self.begin + len(self._losses) * self._plateau.every}"
                )

    @property
    def validates(self) -> bool:
        """Whether the end of this resolution depends on the validation loss."""
        return self._plateau is not None and self._own is None

    def due(self, step: int) -> bool:
        """Return whether to compute the validation loss after `step` steps."""
        return self._plateau is not None and step > self.begin and (step - self.begin) % self._plateau.every == 0

    def note(self, loss: float) -> None:
        """Add a validation loss that is already in metrics.jsonl."""
        self._losses.append(loss)
        if self._leads:
            # Sync: a checkpoint that survives a crash of the machine needs this line.
            sync(self._metrics)

    def ending(self, step: int) -> Ending | None:
        """Return why the resolution ends at `step`; None if it does not."""
        stage, taken = self.stage, step - self.begin
        if self._own is not None:
            return Ending(self._own["rule"], self._own["reason"], self._own["numbers"])
        if self._plateau is not None and (found := plateau(self._losses, self._plateau)):
            return found
        if stage.limit is not None and taken >= stage.limit:
            seen = taken * stage.global_batch
            reason = f"it has seen {seen} samples, {taken} steps of {stage.global_batch}"
            return Ending("samples", reason, {"seen": seen})
        if step >= stage.steps:
            return Ending("steps", f"the stage ends after its {stage.steps} steps", {"steps": stage.steps})
        return None

    def close(self, step: int, ending: Ending) -> None:
        """Record that the resolution ended at `step`, after its checkpoint is on disk."""
        stage = self.stage
        if not stage.resolutions or self._own is not None or not self._leads:
            return
        above = stage.resolutions[stage.resolutions.index(stage.resolution) + 1 :]
        line = {
            "resolution": stage.resolution,
            "from_step": self.begin,
            "to_step": step,
            "samples": (step - self.begin) * stage.global_batch,
            "next": above[0] if above else None,
            "rule": ending.rule,
            "reason": ending.reason,
            "numbers": ending.numbers,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_lines(self._file, [*self._below, line])

    @property
    def _plateau(self) -> Plateau | None:
        """The plateau rule, if this resolution can end by it."""
        return None if self.stage.is_last or self.stage.next_resolution is None else self.stage.next_resolution.plateau

    def _recorded(self, step: int, every: int) -> list[float]:
        """Return the validation losses of this resolution up to `step` or the first gap."""
        by_step = {
            line["step"]: line["validation_loss"] for line in read_lines(self._metrics) if "validation_loss" in line
        }
        return [by_step[at] for at in takewhile(by_step.__contains__, range(self.begin + every, step + 1, every))]
