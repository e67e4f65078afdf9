"""A step's rollouts: captions, rewards and advantages for all micro-batches, before the first forward pass."""

import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wemmu.config.objectives import UnifiedGRPO
from wemmu.heartbeat import beat
from wemmu.noise import Noise
from wemmu.objectives.grpo import advantages
from wemmu.parallel.topology import gathered, rank
from wemmu.recipes.uae.policy import Captions, Policy
from wemmu.recipes.uae.reward import ReconstructionReward
from wemmu.sampling.mode import evaluating
from wemmu.types import Batch, Prepared, Rollout


class Rollouts:
    """Turns batches of images into batches of captions with advantages. A function of weights, step and samples."""

    def __init__(
        self, policy: Policy, reward: ReconstructionReward, objective: UnifiedGRPO, instruction: str, seed: int
    ):
        self.policy, self.reward, self.objective = policy, reward, objective
        self.instruction, self.seed = instruction, seed
        self._kept: Prepared | None = None

    def __call__(self, batches: Sequence[Batch], step: int) -> Prepared:
        """Return the batches of the rollout that `step` belongs to; all ranks call it.

        A rollout serves `objective.updates` steps: further steps learn from the captions of the first one.
        """
        if step % self.objective.updates == 0:
            with evaluating(self.policy.model):
                self._kept = self._made(batches, step)
            return self._kept
        assert self._kept is not None, "no checkpoint lies within a rollout"
        return self._kept._replace(times={"rollout": 0.0, "reward": 0.0}, ranges={})

    def _made(self, batches: Sequence[Batch], step: int) -> Prepared:
        started = time.monotonic()
        captions = [self._sampled(batch, step) for batch in batches]
        sampled = time.monotonic()
        rewarded = [self.reward(c.texts, b.images, b.sample_ids) for c, b in zip(captions, batches, strict=True)]
        rewards = torch.cat([values.cpu() for values, _ in rewarded])
        times = {"rollout": sampled - started, "reward": time.monotonic() - sampled}
        lengths = [len(tokens) for one in captions for tokens in one.tokens]
        # The standard deviation and the number of tokens are those of the whole step, on all ranks.
        ranks = gathered((rewards.tolist(), lengths))
        objective = self.objective
        own = rank() * len(rewards)
        everyone = torch.tensor([row for of_rank, _ in ranks for row in of_rank])
        advantage = advantages(everyone, objective.scale, objective.std, objective.epsilon)[own : own + len(rewards)]
        every_length = [length for _, of_rank in ranks for length in of_rank]
        mean_length = sum(every_length) / len(every_length)
        made, first = [], 0
        for batch, one, (values, also) in zip(batches, captions, rewarded, strict=True):
            part = advantage[first : first + len(values)]
            first += len(values)
            made.append(self._batch(batch, one, values, also, part, mean_length))
            beat()
        return Prepared(made, times, {"length": (min(every_length), max(every_length))})

    def _sampled(self, batch: Batch, step: int) -> Captions:
        noise = Noise(self.seed, step, batch.sample_ids, batch.images.device)
        found = self.policy.sample(
            self.instruction, batch.images, noise, self.objective.group, self.objective.temperature
        )
        beat()
        return found

    def _batch(
        self, batch: Batch, captions: Captions, rewards: Tensor, also: dict[str, Tensor], part: Tensor, mean: float
    ) -> Batch:
        device, objective = batch.images.device, self.objective
        prompts, labels = self.policy.captioned(self.instruction, batch.images, captions.tokens)
        prompts, labels = prompts.to(device), labels.to(device)

        def scored(reference: bool) -> Tensor:
            return self.policy.score(prompts, batch.images, labels, objective.temperature, reference)[0]

        with torch.no_grad():
            rollout = Rollout(
                advantages=part.flatten().to(device),
                mean_length=mean,
                # With one update per rollout they are those of the forward pass itself.
                logp_old=scored(False) if objective.updates > 1 else None,
                logp_ref=scored(True) if objective.beta else None,
                measures={name: value.to(device) for name, value in measures(captions, rewards, also).items()},
            )
        return replace(batch, prompts=prompts, labels=labels, rollout=rollout)


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
