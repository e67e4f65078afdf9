"""What every engine is to the trainer: gradients of a global batch, an optimizer step, and its state by name."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from wemmu.parallel.placed import Placed
from wemmu.types import Batch, Losses


@dataclass(frozen=True)
class TrainState:
    """Everything an optimizer step changes, under canonical names and whole shapes.

    weights, exp_avg, exp_avg_sq: a tensor for each trained parameter of which this rank holds something, whole or, as a
    `Placed`, in parts; float32 and live, so that what is written into them is what the next step uses once `restored`
    was called. steps: optimizer steps taken. ema: likewise the moving average of each weight; empty if none is kept.
    """

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    steps: int
    ema: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def begin_average(self) -> None:
        """Let the average, if one is kept, begin with the weights as they are now."""
        for name, average in self.ema.items():
            pairs = zip(Placed.of(average).parts, Placed.of(self.weights[name]).parts, strict=True)
            for (_, mine), (_, weight) in pairs:
                mine.copy_(weight)


class Engine(Protocol):
    """One rank's part of training. All ranks call the same methods in the same order.

    parameters: numbers of trained and of frozen ones in the whole model.
    """

    parameters: tuple[int, int]

    def accumulate(self, micro_batches: Sequence[Batch], step: int) -> list[Losses]:
        """Forward and backward of this rank's micro-batches of optimizer step `step`.

        Adds the gradient of the mean loss over the global batch. Returns the losses of its own samples, detached.
        """
        ...

    def step(self, lr_share: float) -> float:
        """Clip by the global norm, step with `lr_share` of the peak rates, and clear the gradients.

        Returns the norm of the whole gradient before clipping, equal on all ranks. A norm that is not finite leaves the
        weights untouched; the caller decides what that means.
        """
        ...

    def state(self) -> TrainState:
        """A view of the live tensors; copy before the next step if it must last."""
        ...

    def held(self, names: Iterable[str]) -> dict[str, Tensor]:
        """What this rank holds of parameters, trained or not, by canonical name: whole or `Placed`, in working type."""
        ...

    def restored(self, steps: int) -> None:
        """The tensors of `state` were filled with those of a checkpoint after `steps` steps: go on from there."""
        ...
