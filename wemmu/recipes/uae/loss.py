"""What an optimizer step of UAE minimises: cross-entropy of given captions, or the GRPO loss of sampled ones."""

import torch

from wemmu.config.objectives import CaptionTuning, UnifiedGRPO
from wemmu.objectives.grpo import aggregate, clipped, kl_k3, surrogate
from wemmu.recipes.tuned_vlm import answer_losses
from wemmu.recipes.uae.policy import Policy
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


def loss_of(policy: Policy, objective: object) -> CaptionLoss | GRPOLoss:
    """Return the loss of a stage's objective."""
    if isinstance(objective, UnifiedGRPO):
        return GRPOLoss(policy, objective)
    assert isinstance(objective, CaptionTuning), "the config gives this recipe no other"
    return CaptionLoss(policy)
