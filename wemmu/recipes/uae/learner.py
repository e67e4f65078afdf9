"""The learners of UAE, one for each objective: each prepares a step's batches and computes their loss.

`paths` has those that train the generator.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wemmu.config.schema import StageRun
from wemmu.heartbeat import beat
from wemmu.noise import Noise
from wemmu.objectives.grpo import advantages, aggregate, clipped, kl_k3, surrogate
from wemmu.parallel.topology import gathered, rank
from wemmu.recipes.tuned_vlm import answer_losses
from wemmu.recipes.uae.config import FlowGRPO, UnifiedGRPO
from wemmu.recipes.uae.policy import Captions, Policy
from wemmu.recipes.uae.reward import ReconstructionReward
from wemmu.sampling.mode import evaluating
from wemmu.types import IGNORE_INDEX, Batch, Losses, Prepared, Rollout


class CaptionLearner:
    """Cross-entropy of the captions that the data set has: the cold start of a policy."""

    # Steps that one call of `prepare` serves.
    period = 1

    def __init__(self, policy: Policy, run: StageRun):
        self.policy, self._run = policy, run

    def prepare(self, batches: Sequence[Batch], step: int) -> Prepared:
        """See `wemmu.recipes.recipe.Recipe`."""
        return Prepared(batches)

    def _noise(self, batch: Batch, step: int) -> Noise:
        return Noise(self._run.seed, step, batch.sample_ids, batch.images.device, self._run.kernels.noise)

    def __call__(self, batch: Batch, step: int) -> Losses:
        """Raise ValueError if a record has no caption."""
        if batch.labels is None:
            raise ValueError("the objective caption needs captions, and a record of the batch has none")
        states = self.policy.model.states(batch.prompts, batch.images)
        return Losses.of_task(batch.task, answer_losses(self.policy.model, states, batch.labels))


class RolloutLearner(CaptionLearner):
    """Learns from rollouts, which depend on weights, step and samples, and serve `objective.updates` steps."""

    objective: UnifiedGRPO | FlowGRPO

    def __init__(self, policy: Policy, reward: ReconstructionReward, objective: UnifiedGRPO | FlowGRPO, run: StageRun):
        super().__init__(policy, run)
        self.reward, self.renderer, self.objective = reward, reward.renderer, objective
        self.instruction, self.period = self.renderer.config.instruction, objective.updates
        self._kept: Prepared | None = None

    def prepare(self, batches: Sequence[Batch], step: int) -> Prepared:
        """Return the batches of the rollout that `step` belongs to; all ranks call it."""
        if step % self.period == 0:
            with evaluating(self.policy.model):
                self._kept = self._made(batches, step)
            return self._kept
        assert self._kept is not None, "no checkpoint lies within a rollout"
        return self._kept._replace(times=dict.fromkeys(self._kept.times, 0.0), ranges={})

    def _made(self, batches: Sequence[Batch], step: int) -> Prepared:
        raise NotImplementedError

    def _advantages(self, rewards: Sequence[Tensor]) -> list[Tensor]:
        """Rewards [B, G] of each micro-batch -> advantages [B, G]; their standard deviation may be of all ranks."""
        own = torch.cat([values.cpu() for values in rewards])
        everyone = torch.tensor([row for of_rank in gathered(own.tolist()) for row in of_rank])
        found = advantages(everyone, self.objective.scale, self.objective.std, self.objective.epsilon)
        return list(found[rank() * len(own) :][: len(own)].split([len(values) for values in rewards]))


class GRPOLearner(RolloutLearner):
    """The clipped loss over the captions of a rollout, one value per image; see `wemmu.objectives.grpo`."""

    objective: UnifiedGRPO

    def _made(self, batches: Sequence[Batch], step: int) -> Prepared:
        started = time.monotonic()
        captions = [self._sampled(batch, step) for batch in batches]
        sampled = time.monotonic()
        rewarded = [self.reward(c.texts, b.images, b.sample_ids) for c, b in zip(captions, batches, strict=True)]
        times = {"rollout": sampled - started, "reward": time.monotonic() - sampled}
        advantage = self._advantages([values for values, _ in rewarded])
        own = [len(tokens) for one in captions for tokens in one.tokens]
        lengths = [length for of_rank in gathered(own) for length in of_rank]
        mean, made = sum(lengths) / len(lengths), []
        for batch, one, (values, also), part in zip(batches, captions, rewarded, advantage, strict=True):
            made.append(self._batch(batch, one, measures(one, values, also), part, mean))
            beat()
        return Prepared(made, times, {"length": (min(lengths), max(lengths))})

    def _sampled(self, batch: Batch, step: int) -> Captions:
        objective, noise = self.objective, self._noise(batch, step)
        found = self.policy.sample(self.instruction, batch.images, noise, objective.group, objective.temperature)
        beat()
        return found

    def _batch(
        self, batch: Batch, captions: Captions, recorded: dict[str, Tensor], advantage: Tensor, mean: float
    ) -> Batch:
        device, objective = batch.images.device, self.objective
        prompts, labels = self.policy.captioned(self.instruction, batch.images, captions.tokens)
        prompts, labels = prompts.to(device), labels.to(device)

        def scored(reference: bool) -> Tensor:
            return self.policy.score(prompts, batch.images, labels, objective.temperature, reference)[0]

        rollout = Rollout(
            advantages=advantage.flatten().to(device),
            mean_length=mean,
            # With one update per rollout they are those of the forward pass itself.
            logp_old=scored(False) if objective.updates > 1 else None,
            logp_ref=scored(True) if objective.beta else None,
            measures={name: value.to(device) for name, value in recorded.items()},
        )
        return replace(batch, prompts=prompts, labels=labels, rollout=rollout)

    def __call__(self, batch: Batch, step: int) -> Losses:
        rollout, objective = batch.rollout, self.objective
        assert rollout is not None, "`prepare` adds it"
        assert batch.labels is not None, "and the captions' labels"
        logp, entropy = self.policy.score(batch.prompts, batch.images, batch.labels, objective.temperature)
        old = logp.detach() if rollout.logp_old is None else rollout.logp_old
        mask = batch.labels != IGNORE_INDEX
        low, high = objective.clip, objective.high
        each = surrogate(logp, old, rollout.advantages, low, high, objective.delta)
        below, above = clipped(logp.detach(), old, rollout.advantages, low, high)
        per_token = {"entropy": entropy, "clipped_low": below & mask, "clipped_high": above & mask}
        if rollout.logp_ref is not None:
            kl = kl_k3(logp, rollout.logp_ref)
            each = each + objective.beta * kl
            per_token["kl"] = kl.detach()

        def of_images(values: Tensor) -> Tensor:
            return values.unflatten(0, (len(batch.images), -1))

        tokens = of_images(mask.sum(1)).sum(1)
        parts = {name: of_images((value * mask).sum(1)).sum(1) / tokens for name, value in per_token.items()}
        values = aggregate(each, mask, objective.aggregate, self.policy.max_length, rollout.mean_length)
        return Losses.of_task(batch.task, of_images(values).mean(1), {**rollout.measures, **parts})


def measures(captions: Captions, rewards: Tensor, also: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what is recorded of each image, name -> [B]; rewards and `also`: [B, G], of one caption or of G."""
    group = len(captions.tokens) // len(rewards)
    lengths = torch.tensor([float(len(tokens)) for tokens in captions.tokens]).unflatten(0, (-1, group))
    cut = torch.tensor(captions.truncated).float().unflatten(0, (-1, group))
    return {
        "reward": rewards.mean(1),
        "reward_std": rewards.std(1),
        "zero_std": (rewards.amax(1) == rewards.amin(1)).float(),
        **{f"reward/{name}": values.mean(1) for name, values in also.items()},
        "length": lengths.mean(1),
        "truncated": cut.mean(1),
    }
