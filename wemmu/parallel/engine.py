"""The interface of engines: gradients of a global batch, an optimizer step, and the state by name."""

from collections.abc import Iterable, Sequence
from typing import Protocol, SupportsFloat

from torch import Tensor

from wemmu.checkpoint.state import TrainState
from wemmu.types import Batch, Losses


class Engine(Protocol):
    """One rank's part of training. All ranks call the same methods in the same order."""

    def accumulate(self, micro_batches: Sequence[Batch], step: int) -> list[Losses]:
        """Forward and backward of this rank's micro-batches of optimizer step `step`.

        Adds the gradient of the mean loss over the global batch. Returns the losses of its own samples, detached.
        """
        ...

    def step(self, lr_share: float) -> SupportsFloat:
        """Clip by the global norm, step with `lr_share` of the peak rates, and clear the gradients.

        Returns the norm of the whole gradient before clipping, equal on all ranks. Reading it may wait for the device.
        A norm that is not finite leaves the weights untouched; the caller decides what that means.
        """
        ...

    def state(self) -> TrainState:
        """Return a view of the live tensors; copy it to keep it beyond the next step."""
        ...

    def local_parameters(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return what this rank holds of parameters, trained or not, by canonical name: whole or sharded."""
        ...

    def on_restore(self, steps: int) -> None:
        """Continue after the tensors of `state` were filled from a checkpoint after `steps` steps."""
        ...
