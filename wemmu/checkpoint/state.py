"""The train state by name: the slots of a checkpoint."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from wemmu.checkpoint.sharded_tensor import ShardedTensor


@dataclass(frozen=True)
class TrainState:
    """Everything an optimizer step changes, under canonical names and whole shapes.

    weights, exp_avg, exp_avg_sq: a tensor for each trained parameter of which this rank holds something, whole or, as a
    `ShardedTensor`, in parts; float32 and live, so the next step uses what is written into them, once `on_restore` was
    called. steps: optimizer steps taken. ema: likewise the moving average of each weight; empty if none is kept.
    """

    weights: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    steps: int
    ema: dict[str, Tensor] = field(default_factory=dict)

    @torch.no_grad()
    def begin_average(self) -> None:
        """Start the average, if one is kept, with the current weights."""
        for name, average in self.ema.items():
            pairs = zip(ShardedTensor.of(average).parts, ShardedTensor.of(self.weights[name]).parts, strict=True)
            for (_, mine), (_, weight) in pairs:
                mine.copy_(weight)
