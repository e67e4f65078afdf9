"""What an optimizer step minimises: one loss per sample of a micro-batch, with tags to report it by."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from wemmu.config.schema import StageRun
from wemmu.models.model import WeMMU
from wemmu.noise import Noise
from wemmu.objectives.flow import contrastive_flow_matching, flow_matching, negatives
from wemmu.objectives.path import sample_time
from wemmu.types import Batch

TIME_BINS = 4


class Losses(NamedTuple):
    """values: [B], with gradient. tags: name of a metric -> which samples count for it, bool [B]."""

    values: Tensor
    tags: dict[str, Tensor]


# (micro-batch, optimizer step) -> losses; all that the trainer knows of an objective.
LossFn = Callable[[Batch, int], Losses]


class FlowMatchingLoss:
    """The objective of a generation stage over the whole model: encode, condition, and match the flow."""

    def __init__(self, model: WeMMU, run: StageRun):
        self.model, self.config, self.seed = model, run.stage.objective, run.seed
        self.resolution = run.stage.resolution

    def __call__(self, batch: Batch, step: int) -> Losses:
        noise = Noise(self.seed, step, batch.sample_ids.cpu(), batch.target.device)
        targets, inputs = (None, None) if batch.latents is None else (batch.latents.target, batch.latents.images)
        x_0 = self.model.target_latents(batch.target, targets)
        eps = noise.normal("eps", tuple(x_0.shape[1:]))
        t = sample_time(self.config.time, self.resolution, noise.normal("time", ()))
        condition = self.model.condition(batch.prompts, batch.images, tuple(batch.target.shape[-2:]), noise, inputs)

        def velocity(x_t: Tensor, t: Tensor) -> Tensor:
            return self.model.velocity(x_t, t, condition)

        match self.config.kind:
            case "flow":
                values = flow_matching(velocity, x_0, eps, t)
            case "contrastive":
                pairs = negatives(batch.sample_ids)
                values = contrastive_flow_matching(velocity, x_0, eps, t, pairs, self.config.weight)
        return Losses(values, {f"loss/{batch.task}": torch.ones_like(t, dtype=torch.bool)} | _by_time(t))


def _by_time(t: Tensor) -> dict[str, Tensor]:
    """Loss by noise level, in equal bins of t: where a model that looks fine on average goes wrong."""
    bins = (t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    return {f"loss/t_{i / TIME_BINS:.2f}_{(i + 1) / TIME_BINS:.2f}": bins == i for i in range(TIME_BINS)}
