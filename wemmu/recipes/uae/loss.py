"""What an optimizer step of UAE minimises: cross-entropy, GRPO of captions or of paths, or a cold start."""

import torch
from torch import Tensor

from wemmu.backbones.encoders import cosine
from wemmu.config.objectives import CaptionTuning, ColdStart, UnifiedGRPO
from wemmu.noise import Noise
from wemmu.objectives.flow_grpo import divergence
from wemmu.objectives.grpo import aggregate, clipped, kl_k3, surrogate
from wemmu.recipes.tuned_vlm import answer_losses
from wemmu.recipes.uae.generator import Renderer
from wemmu.recipes.uae.paths import FlowPolicy
from wemmu.recipes.uae.policy import Policy
from wemmu.recipes.uae.reward import Encoder
from wemmu.sampling.mode import evaluating
from wemmu.sampling.solvers import euler
from wemmu.types import IGNORE_INDEX, Batch, Losses


class CaptionLoss:
    """Cross-entropy of the captions that the data set has: the cold start of a policy."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def __call__(self, batch: Batch, step: int) -> Losses:
        """Raises ValueError if a record has no caption."""
        if batch.labels is None:
            raise ValueError("the objective caption needs captions, and a record of the batch has none")
        model = self.policy.model
        states = model.states(batch.prompts, batch.images)
        values = answer_losses(model, states, batch.labels)
        return Losses(values, {f"loss/{batch.task}": torch.ones_like(values, dtype=torch.bool)})


class GRPOLoss:
    """The clipped loss over the captions of a rollout, one value per image; see `wemmu.objectives.grpo`."""

    def __init__(self, policy: Policy, objective: UnifiedGRPO):
        self.policy, self.objective = policy, objective

    def __call__(self, batch: Batch, step: int) -> Losses:
        rollout, objective = batch.rollout, self.objective
        assert rollout is not None, "the recipe's `prepare` adds it"
        assert batch.labels is not None, "and the captions' labels"
        logp, entropy = self.policy.score(batch.prompts, batch.images, batch.labels, objective.temperature)
        old = logp.detach() if rollout.logp_old is None else rollout.logp_old
        mask = batch.labels != IGNORE_INDEX
        low, high = objective.clip, objective.high
        each = surrogate(logp, old, rollout.advantages, low, high, objective.delta)
        parts = dict(rollout.measures)
        below, above = clipped(logp.detach(), old, rollout.advantages, low, high)
        per_token = {"entropy": entropy, "clipped_low": below & mask, "clipped_high": above & mask}
        if rollout.logp_ref is not None:
            kl = kl_k3(logp, rollout.logp_ref)
            each = each + objective.beta * kl
            per_token["kl"] = kl.detach()
        values = aggregate(each, mask, objective.aggregate, self.policy.max_length, rollout.mean_length)
        images = len(batch.images)
        tokens = mask.sum(1).unflatten(0, (images, -1)).sum(1)
        for name, value in per_token.items():
            parts[name] = (value * mask).sum(1).unflatten(0, (images, -1)).sum(1) / tokens
        values = values.unflatten(0, (images, -1)).mean(1)
        return Losses(values, {f"loss/{batch.task}": torch.ones_like(values, dtype=torch.bool)}, parts)


class FlowLoss:
    """The clipped loss over the stochastic steps of paths, one value per image; see `wemmu.objectives.flow_grpo`."""

    def __init__(self, flow: FlowPolicy):
        self.flow = flow

    def __call__(self, batch: Batch, step: int) -> Losses:
        paths, objective = batch.paths, self.flow.objective
        assert paths is not None, "the recipe's `prepare` adds them"
        steps = self.flow.transitions(paths)
        logp = self.flow.score(paths, steps)
        old = logp.detach() if paths.logp_old is None else paths.logp_old
        each = surrogate(logp, old, paths.advantages, objective.clip, objective.clip)
        below, above = clipped(logp.detach(), old, paths.advantages, objective.clip, objective.clip)
        recorded = {
            "ratio": (logp.detach() - old).exp(),
            "clipped_low": below.float(),
            "clipped_high": above.float(),
        }
        if paths.means is not None:
            pairs = zip(steps, paths.means.unbind(1), strict=True)
            kl = torch.stack([divergence(step.mean, mean, step.std) for step, mean in pairs], 1)
            each = each + objective.beta * kl
            recorded["kl"] = kl.detach()

        def of_images(values: Tensor) -> Tensor:
            return values.mean(1).unflatten(0, (len(batch.images), -1)).mean(1)

        values = of_images(each)
        parts = {**paths.measures, **{name: of_images(value) for name, value in recorded.items()}}
        return Losses(values, {f"loss/{batch.task}": torch.ones_like(values, dtype=torch.bool)}, parts)


class ColdStartLoss:
    """1 - cosine of image and reconstruction, one value per image, with gradient through the sampler's last steps."""

    def __init__(self, renderer: Renderer, objective: ColdStart, encoder: Encoder, seed: int, reads: bool):
        """reads: whether the VLM that conditions the generator learns, so that the condition has a gradient."""
        self.renderer, self.objective, self.encoder = renderer, objective, encoder
        self.seed, self.reads = seed, reads

    def __call__(self, batch: Batch, step: int) -> Losses:
        paths, renderer, images = batch.paths, self.renderer, batch.images
        assert paths is not None, "the recipe's `prepare` adds them"
        full = paths.full
        if self.reads:
            noise = Noise(self.seed, step, batch.sample_ids, images.device)
            sees = renderer.config.condition == "in_context"
            with evaluating(renderer.model), torch.enable_grad():
                full = renderer.read(batch.prompts, sees, images, noise, with_gradient=True)
        velocity = renderer.velocity(full, paths.empty)
        made = renderer.decoded(euler(velocity, paths.states[:, 0], renderer.times[-1 - self.objective.last :]))
        with torch.no_grad():
            wanted = self.encoder.embed(images[:, 0].float() / 255)
        cosines = cosine(self.encoder.embed(made), wanted)
        values = 1 - cosines
        parts = {**paths.measures, "reward": cosines.detach()}
        return Losses(values, {f"loss/{batch.task}": torch.ones_like(values, dtype=torch.bool)}, parts)


def loss_of(policy: Policy, objective: object) -> CaptionLoss | GRPOLoss:
    """Return the loss of an objective that the policy alone learns from."""
    if isinstance(objective, UnifiedGRPO):
        return GRPOLoss(policy, objective)
    assert isinstance(objective, CaptionTuning), "the config gives this recipe no other"
    return CaptionLoss(policy)
