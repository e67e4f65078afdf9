"""A stage's ladder of resolutions: what ends a rung."""

from typing import Annotated

from pydantic import Field

from wemmu.config.base import Config, Positive


class Plateau(Config):
    """The validation loss falls no further.

    Every `every` steps of a rung the loss of the held-out records (`data.validation`) is computed. Its mean over the
    last `window` of these validations is compared with the lowest such mean before: the rung ends when `patience`
    validations in a row have not brought it lower by the share `min_gain`.
    """

    every: Positive
    window: Positive
    min_gain: Annotated[float, Field(ge=0, lt=1)]
    patience: Positive

    @property
    def fewest(self) -> int:
        """Steps of a rung before which it cannot end by this rule."""
        return (self.window + self.patience) * self.every


class NextRung(Config):
    """When a rung ends, other than the last, which ends with its stage.

    samples: as soon as a rung has seen so many, hence at the end of the step that reaches them; one number for all
    rungs or one for each. plateau: or before, when the validation loss falls no further.
    """

    samples: Positive | tuple[Positive, ...]
    plateau: Plateau | None = None

    def limits(self, rungs: int, global_batch: int) -> tuple[int, ...]:
        """Steps that each of `rungs` rungs but the last takes at most.

        Raises:
            ValueError: if `samples` are of another number of rungs.
        """
        numbers = self.samples if isinstance(self.samples, tuple) else (self.samples,) * (rungs - 1)
        if len(numbers) != rungs - 1:
            raise ValueError(
                f"next_rung.samples has {len(numbers)} numbers for a ladder of {rungs} resolutions; valid: one number, "
                f"or {rungs - 1}, one for each rung but the last"
            )
        return tuple(-(-number // global_batch) for number in numbers)
