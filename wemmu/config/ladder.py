"""Stages with several resolutions ("rungs"): the rules that end a resolution."""

from typing import Annotated

from pydantic import Field

from wemmu.config.base import Config, Positive


class Plateau(Config):
    """The validation loss stops falling.

    Every `every` steps training computes the loss of the held-out records (`data.validation`) and its mean over the
    last `window` validations. The rung ends when `patience` validations in a row do not lower the best mean by the
    share `min_gain`.
    """

    every: Positive
    window: Positive
    min_gain: Annotated[float, Field(ge=0, lt=1)]
    patience: Positive

    @property
    def fewest(self) -> int:
        """The smallest number of steps after which this rule can end a rung."""
        return (self.window + self.patience) * self.every


class NextRung(Config):
    """When a rung ends; the last one ends with its stage.

    samples: the rung ends with the step that reaches this number; one number for all rungs or one for each. plateau:
    it ends earlier if the validation loss stops falling.
    """

    samples: Positive | tuple[Positive, ...]
    plateau: Plateau | None = None

    def limits(self, rungs: int, global_batch: int) -> tuple[int, ...]:
        """Return the maximal number of steps of each of `rungs` rungs but the last.

        Raises:
            ValueError: if `samples` has the wrong length.
        """
        numbers = self.samples if isinstance(self.samples, tuple) else (self.samples,) * (rungs - 1)
        if len(numbers) != rungs - 1:
            raise ValueError(
                f"next_rung.samples has {len(numbers)} numbers for {rungs} resolutions; valid: one number, "
                f"or {rungs - 1}, one for each resolution but the last"
            )
        return tuple(-(-number // global_batch) for number in numbers)
