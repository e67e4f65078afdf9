"""What an optimizer step minimises: one loss per sample of a micro-batch, with tags to report it by."""

import torch
from torch import Tensor

from wemmu.config.reconstruction import Denoiser
from wemmu.config.schema import StageRun
from wemmu.models.model import WeMMU
from wemmu.models.ross import Ross
from wemmu.noise import Noise
from wemmu.objectives.flow import contrastive_flow_matching, flow_matching, time_weight
from wemmu.objectives.path import sample_path, sample_time
from wemmu.objectives.reconstruction import answering, denoising, noised, regression
from wemmu.types import UNASKED, Batch, Condition, Flow, Losses

TIME_BINS = 4


class FlowMatchingLoss:
    """The objective of a generation stage over the whole model: draw, condition, ask for the velocity, compare.

    The parts are open, because an engine may compute the velocity elsewhere and for many micro-batches at a time
    (`wemmu.parallel.hybrid`); called as a whole, they run one after the other.
    """

    def __init__(self, model: WeMMU, run: StageRun):
        self.model, self.config, self.seed = model, run.stage.objective, run.seed
        self.resolution = run.stage.resolution

    def __call__(self, batch: Batch, step: int) -> Losses:
        flow, condition = self.draw(batch, step), self.condition(batch, step)
        predicted = self.model.velocity(flow.x_t, flow.t, condition)
        return Losses(self.values(predicted, flow), self.tags(batch, flow))

    @torch.no_grad()
    def draw(self, batch: Batch, step: int) -> Flow:
        """The points of the paths at which the velocity is asked for, and what it should be."""
        noise = self._noise(batch, step)
        x_0 = self.model.target_latents(batch.target, None if batch.latents is None else batch.latents.target).float()
        eps = noise.normal("eps", tuple(x_0.shape[1:]))
        t = sample_time(self.config.time, self.resolution, noise.normal("time", ()))
        path = sample_path(x_0, eps, t)
        if self.config.kind == "flow":
            return Flow(path.x_t, t, path.v)
        negatives = batch.negatives
        assert negatives is not None, "the loader pairs the samples of a contrastive stage"
        further = Noise(self.seed, step, negatives.sample_ids.cpu(), x_0.device)
        v = path.v
        if len(negatives.target):
            x_0 = self.model.target_latents(negatives.target, negatives.latents).float()
            v = torch.cat([v, further.normal("eps", tuple(x_0.shape[1:])) - x_0])
        ids = torch.cat([batch.sample_ids, negatives.sample_ids])
        return Flow(path.x_t, t, path.v, v[negatives.index], ids[negatives.index] != batch.sample_ids)

    def condition(self, batch: Batch, step: int) -> Condition:
        """The condition for a micro-batch, with the bridge's gradient."""
        size = tuple(batch.target.shape[-2:])
        inputs = None if batch.latents is None else batch.latents.images
        return self.model.condition(batch.prompts, batch.images, size, self._noise(batch, step), inputs)

    def values(self, predicted: Tensor, flow: Flow) -> Tensor:
        """One loss per sample, [B], of velocities predicted at the points of `flow`, weighted by their times."""
        match self.config.kind:
            case "flow":
                values = flow_matching(predicted, flow.v)
            case "contrastive":
                values = contrastive_flow_matching(predicted, flow.v, flow.v_negative, flow.paired, self.config.weight)
        return time_weight(self.config.weighting, flow.t) * values

    def tags(self, batch: Batch, flow: Flow) -> dict[str, Tensor]:
        """By task, and by noise level in equal bins of t: where a model that looks fine on average goes wrong."""
        bins = (flow.t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
        by_time = {f"loss/t_{i / TIME_BINS:.2f}_{(i + 1) / TIME_BINS:.2f}": bins == i for i in range(TIME_BINS)}
        return {f"loss/{batch.task}": torch.ones_like(bins, dtype=torch.bool)} | by_time

    def _noise(self, batch: Batch, step: int) -> Noise:
        return Noise(self.seed, step, batch.sample_ids.cpu(), batch.target.device)


class ReconstructiveLoss:
    """L_text + weight * L_visual of ROSS: say what is right, and keep what the picture shows.

    Each is a mean over a sample (its answer's tokens; its pictures), so a sample weighs the same in every layout.
    """

    def __init__(self, model: Ross, run: StageRun):
        self.model, self.weight, self.seed = model, run.stage.objective.weight, run.seed
        self.head = run.reconstruction.head

    def __call__(self, batch: Batch, step: int) -> Losses:
        assert batch.wanted is not None, "a batch of understanding says what is wanted"
        states = self.model.states(batch.prompts, batch.images)
        rows, tokens = (batch.wanted != UNASKED).nonzero(as_tuple=True)
        # Logits only where a token is wanted: there are as many as words in the vocabulary.
        logits = self.model.logits(states.text[rows, tokens])
        text = answering(logits, batch.wanted[rows, tokens], rows, len(batch.wanted))
        visual = self.visual(batch, states.pictures, step) if batch.images.shape[1] else torch.zeros_like(text)
        tags = {f"loss/{batch.task}": torch.ones_like(text, dtype=torch.bool)}
        return Losses(text + self.weight * visual, tags, {"loss/text": text, "loss/visual": visual})

    def visual(self, batch: Batch, states: Tensor, step: int) -> Tensor:
        """How far each sample's pictures are from restored, [B]; states: [B, N, rows * columns, D]."""
        b, n = batch.images.shape[:2]
        target = self.model.target(batch.images.flatten(0, 1))  # [B * N, C, h, w]
        states = states.flatten(0, 1).float()
        if not isinstance(self.head, Denoiser):
            predicted = self.model.head(states, tuple(target.shape[-2:]))
            return regression(predicted, target, self.head.metric).reshape(b, n).mean(1)
        repeats, noise = self.head.repeats, Noise(self.seed, step, batch.sample_ids.cpu(), target.device)
        # Draws of each picture next to each other: [B * N * repeats, ...].
        eps = noise.normal("eps", (n, repeats, *target.shape[1:])).flatten(0, 2)
        t = (noise.uniform("time", (n, repeats)) * self.head.timesteps).long().flatten()
        z_t = noised(target.repeat_interleave(repeats, 0), eps, t, self.head.timesteps)
        predicted = self.model.head(z_t, t, states.repeat_interleave(repeats, 0))
        return denoising(predicted, eps).reshape(b, n * repeats).mean(1)
