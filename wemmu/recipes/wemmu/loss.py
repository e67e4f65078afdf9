"""The loss of WeMMU: flow matching, one value per sample, with tags for reports."""

from dataclasses import replace

import torch
from torch import Tensor

from wemmu.config.schema import StageRun
from wemmu.config.task import Task
from wemmu.noise import Noise
from wemmu.objectives.flow import contrastive_flow_matching, square_error, time_weight
from wemmu.objectives.path import sample_path, sample_time
from wemmu.recipes.wemmu.config import FlowMatching
from wemmu.recipes.wemmu.config import WeMMU as WeMMUConfig
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.types import Batch, Begun, Condition, Flow, Losses

TIME_BINS = 4


class FlowMatchingLoss:
    """The objective of a generation stage over the whole model, in two parts: `begin`, with the bridge, and `values`.

    Between them the DiT computes the velocity. An engine may do this elsewhere and for many micro-batches at a time
    (`wemmu.parallel.hybrid`); otherwise the loss does it.
    """

    def __init__(self, model: WeMMU, run: StageRun):
        self.model, self.seed, self.source = model, run.seed, run.kernels.noise
        assert isinstance(run.stage.objective, FlowMatching), "the config gives this recipe no other"
        self.config = run.stage.objective
        self.resolution = run.stage.resolution
        assert isinstance(run.recipe, WeMMUConfig)
        self.reconstruct_without_vae = run.recipe.bridge.reconstruct_without_vae

    def __call__(self, batch: Batch, step: int) -> Losses:
        begun = self.begin(batch, step)
        predicted = self.model.velocity(begun.flow.x_t, begun.flow.t, begun.condition)
        return Losses(self.values(predicted, begun.flow), begun.tags)

    def begin(self, batch: Batch, step: int) -> Begun:
        """Return everything that the DiT needs for a micro-batch, and its target."""
        flow = self.draw(batch, step)
        return Begun(flow, self.condition(batch, step), self.tags(batch, flow))

    @torch.no_grad()
    def draw(self, batch: Batch, step: int) -> Flow:
        """Draw the points of the paths, and the velocities there."""
        noise = self._noise(batch, step)
        x_0 = self.model.target_latents(_target(batch), None if batch.latents is None else batch.latents.target).float()
        eps = noise.normal("eps", tuple(x_0.shape[1:]))
        t = sample_time(self.config.time, self.resolution, noise.normal("time", ()))
        flow = sample_path(x_0, eps, t)
        if self.config.kind == "flow":
            return flow
        negatives = batch.negatives
        assert negatives is not None, "the loader pairs the samples of a contrastive stage"
        further = Noise(self.seed, step, negatives.sample_ids, x_0.device, self.source)
        v = flow.v
        if len(negatives.target):
            x_0 = self.model.target_latents(negatives.target, negatives.latents).float()
            v = torch.cat([v, further.normal("eps", tuple(x_0.shape[1:])) - x_0])
        ids = torch.cat([batch.sample_ids, negatives.sample_ids])
        return replace(flow, v_negative=v[negatives.index], paired=ids[negatives.index] != batch.sample_ids)

    def condition(self, batch: Batch, step: int) -> Condition:
        """Return the condition for a micro-batch, with the bridge's gradient."""
        height, width = _target(batch).shape[-2:]
        inputs = None if batch.latents is None else batch.latents.images
        by_latents = not (batch.task is Task.RECONSTRUCTION and self._without_vae(step))
        noise, size = self._noise(batch, step), (height, width)
        return self.model.condition(
            batch.prompts, batch.images, size, noise, inputs, by_latents, batch.task, batch.sizes
        )

    def _without_vae(self, step: int) -> bool:
        """One draw for a step, whose samples all have one task: the same on all ranks."""
        draw = Noise(self.seed, step, torch.zeros(1, dtype=torch.int64)).uniform("without vae")
        return bool(draw < self.reconstruct_without_vae)

    def values(self, predicted: Tensor, flow: Flow) -> Tensor:
        """Return one loss per sample, [B], of velocities predicted at the points of `flow`, weighted by time."""
        match self.config.kind:
            case "flow":
                values = square_error(predicted, flow.v)
            case "contrastive":
                assert flow.v_negative is not None, "`draw` pairs them"
                assert flow.paired is not None, "`draw` pairs them"
                values = contrastive_flow_matching(predicted, flow.v, flow.v_negative, flow.paired, self.config.weight)
        return time_weight(self.config.weighting, flow.t) * values

    def tags(self, batch: Batch, flow: Flow) -> dict[str, Tensor]:
        """Tag losses by task and by equal bins of t, to show where a model fails that is good on average."""
        bins = (flow.t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        by_time = {f"loss/t_{i / TIME_BINS:.2f}_{(i + 1) / TIME_BINS:.2f}": bins == i for i in range(TIME_BINS)}
        return {f"loss/{batch.task}": torch.ones_like(bins, dtype=torch.bool)} | by_time

    def _noise(self, batch: Batch, step: int) -> Noise:
        return Noise(self.seed, step, batch.sample_ids, _target(batch).device, self.source)


def _target(batch: Batch) -> Tensor:
    assert batch.target is not None, "the config gives this recipe tasks with a target only"
    return batch.target
