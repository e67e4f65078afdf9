"""What an optimizer step of ROSS minimises: cross-entropy of the answers and the loss of the reconstruction."""

from torch import Tensor

from wemmu.config.schema import StageRun
from wemmu.noise import Noise
from wemmu.objectives.flow import square_error
from wemmu.objectives.reconstruction import add_noise, regression
from wemmu.recipes.ross.config import Denoiser, ReconstructiveTuning
from wemmu.recipes.ross.model import Ross
from wemmu.recipes.tuned_vlm import answer_losses
from wemmu.types import Batch, Losses


class ReconstructiveLoss:
    """L_text + weight * L_visual of ROSS.

    L_text is a mean over the answers or over their tokens (`ReconstructiveTuning.answers`), L_visual a mean over the
    images: a step's global batch is of one stream, so all of its samples have the same number of them. A step of words
    alone has no L_visual.
    """

    def __init__(self, model: Ross, run: StageRun):
        assert isinstance(run.stage.objective, ReconstructiveTuning), "the config gives this recipe no other"
        self.model, self.weight = model, run.stage.objective.weight
        self.seed, self.source = run.seed, run.kernels.noise
        self.head = model.config.head

    def __call__(self, batch: Batch, step: int) -> Losses:
        assert batch.labels is not None, "a batch of understanding has labels"
        states = self.model.states(batch.prompts, batch.images)
        text = answer_losses(self.model, states.text, batch.labels, batch.answer_length)
        if not batch.images.shape[1]:
            return Losses.of_task(batch.task, text, {"loss/text": text})
        visual = self.visual(batch, states.images, step)
        parts = {"loss/text": text, "loss/visual": visual}
        return Losses.of_task(batch.task, text + self.weight * visual, parts)

    def visual(self, batch: Batch, states: Tensor, step: int) -> Tensor:
        """Compute the reconstruction loss of each sample, [B]; states: [B, N, rows * columns, D]."""
        b, n = batch.images.shape[:2]
        target = self.model.target(batch.images.flatten(0, 1))  # [B * N, C, h, w]
        states = states.flatten(0, 1).float()
        if not isinstance(self.head, Denoiser):
            predicted = self.model.targets.decoded(self.model.head(states, tuple(target.shape[-2:])))
            return regression(predicted, target, self.head.metric).reshape(b, n).mean(1)
        repeats, noise = self.head.repeats, Noise(self.seed, step, batch.sample_ids, target.device, self.source)
        # Draws of each image next to each other: [B * N * repeats, ...].
        eps = noise.normal("eps", (n, repeats, *target.shape[1:])).flatten(0, 2)
        t = (noise.uniform("time", (n, repeats)) * self.head.timesteps).long().flatten()
        z_t = add_noise(target.repeat_interleave(repeats, 0), eps, t, self.head.timesteps)
        predicted = self.model.head(z_t, t, states.repeat_interleave(repeats, 0))
        return square_error(predicted, eps).reshape(b, n * repeats).mean(1)
