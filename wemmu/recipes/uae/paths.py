"""Rollouts of the generator: images of the VLM's captions and how they were drawn, for Flow-GRPO and cold starts."""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from wemmu.config.objectives import ColdStart, FlowGRPO
from wemmu.heartbeat import beat
from wemmu.noise import Noise
from wemmu.objectives.flow_grpo import log_probability
from wemmu.objectives.grpo import advantages
from wemmu.parallel.topology import gathered, rank
from wemmu.recipes.uae.generator import Renderer
from wemmu.recipes.uae.policy import Captions, Policy
from wemmu.recipes.uae.reward import ReconstructionReward
from wemmu.recipes.uae.rollout import measures
from wemmu.sampling.mode import evaluating
from wemmu.sampling.sde import Transition, Window, sample, transition
from wemmu.sampling.solvers import euler
from wemmu.types import Batch, Paths, Prepared


class FlowPolicy:
    """The sampler as a policy: what it does by chance, and how likely that was. Rollout and loss share it."""

    def __init__(self, renderer: Renderer, objective: FlowGRPO):
        self.renderer, self.objective = renderer, objective
        self.steps = range(objective.first, objective.first + objective.window)

    def sample(self, full: Tensor, empty: Tensor, x: Tensor, noise: Noise) -> Window:
        """Draw `group` images of each sample from x [B, C, h, w] at t = 1; states of the condition: [B, Q, C_y].

        Members of a group begin with the same x; the noise of their steps is keyed by sample, member and step.
        """
        objective, shape = self.objective, tuple(x.shape[1:])

        def drawn(step: int) -> Tensor:
            members = [noise.normal(f"path/{member}/{step}", shape) for member in range(objective.group)]
            return torch.stack(members, 1).flatten(0, 1)

        full, empty, x = (one.repeat_interleave(objective.group, 0) for one in (full, empty, x))
        velocity, ts = self.renderer.velocity(full, empty), self.renderer.times
        return sample(objective.sde, velocity, x, ts, self.steps, objective.noise_level, drawn)

    def transitions(self, paths: Paths, reference: bool = False) -> list[Transition]:
        """Return the distribution of each stochastic step of the paths; reference: by the DiT of the stage's start."""
        objective, count = self.objective, len(self.steps)
        x = paths.states[:, :-1]  # [B * G, W, C, h, w]
        # All steps of all paths at once.
        full, empty = (one.repeat_interleave(objective.group * count, 0) for one in (paths.full, paths.empty))
        ts = self.renderer.schedule
        t = torch.tensor([ts[i] for i in self.steps], device=x.device).repeat(len(x))
        v = self.renderer.velocity(full, empty, reference)(x.flatten(0, 1), t).unflatten(0, (-1, count))
        return [
            transition(objective.sde, v[:, w], x[:, w], ts[i], ts[i + 1], objective.noise_level)
            for w, i in enumerate(self.steps)
        ]

    def score(self, paths: Paths, steps: Sequence[Transition]) -> Tensor:
        """Return the log-probabilities of the paths' steps, float32 [B * G, W]."""
        after = paths.states[:, 1:].unbind(1)
        return torch.stack([log_probability(x, *step) for x, step in zip(after, steps, strict=True)], 1)


class FlowRollouts:
    """Turns batches of images into paths with advantages. A function of weights, step and samples."""

    def __init__(self, policy: Policy, flow: FlowPolicy, reward: ReconstructionReward, instruction: str, seed: int):
        self.policy, self.flow, self.reward, self.instruction, self.seed = policy, flow, reward, instruction, seed
        self._kept: Prepared | None = None

    @torch.no_grad()
    def __call__(self, batches: Sequence[Batch], step: int) -> Prepared:
        """Return the batches of the rollout that `step` belongs to, as `wemmu.recipes.uae.rollout.Rollouts` does."""
        if step % self.flow.objective.updates == 0:
            with evaluating(self.policy.model):
                self._kept = self._made(batches, step)
            return self._kept
        assert self._kept is not None, "no checkpoint lies within a rollout"
        return self._kept._replace(times=dict.fromkeys(self._kept.times, 0.0), ranges={})

    def _made(self, batches: Sequence[Batch], step: int) -> Prepared:
        objective, times = self.flow.objective, [time.monotonic()]
        noises = [Noise(self.seed, step, batch.sample_ids, batch.images.device) for batch in batches]
        captions = []
        for batch, noise in zip(batches, noises, strict=True):
            captions.append(self._captions(batch, noise))
            beat()
        times.append(time.monotonic())
        drawn = [self._drawn(*one) for one in zip(batches, captions, noises, strict=True)]
        times.append(time.monotonic())
        rewarded = []
        for (_, images), batch in zip(drawn, batches, strict=True):
            rewarded.append(self.reward.compared(images, batch.images))
            beat()
        rewards = torch.cat([values.cpu() for values, _ in rewarded])
        times.append(time.monotonic())
        own = rank() * len(rewards)
        # The standard deviation may be that of the whole step, on all ranks.
        everyone = torch.tensor([row for of_rank in gathered(rewards.tolist()) for row in of_rank])
        found = advantages(everyone, objective.scale, objective.std, objective.epsilon)
        found = found.clamp(-objective.limit, objective.limit)[own : own + len(rewards)]
        made, first = [], 0
        for batch, one, (paths, _), (values, also) in zip(batches, captions, drawn, rewarded, strict=True):
            part, device = found[first : first + len(values)].flatten(), batch.images.device
            first += len(values)
            recorded = {name: value.to(device) for name, value in measures(one, values, also).items()}
            made.append(
                replace(batch, paths=self._scored(replace(paths, advantages=part.to(device), measures=recorded)))
            )
            beat()
        names = ("caption", "rollout", "reward")
        return Prepared(made, {name: b - a for name, (a, b) in zip(names, pairwise(times), strict=True)})

    def _captions(self, batch: Batch, noise: Noise) -> Captions:
        """Return one caption of each image.

        Raises:
            ValueError: if it is the data set's, and a record has none.
        """
        objective = self.flow.objective
        if objective.captions == "policy":
            return self.policy.sample(self.instruction, batch.images, noise, 1, objective.temperature)
        if batch.labels is None:
            raise ValueError(
                "objective.captions: data needs captions, and a record of the batch has none; valid: policy"
            )
        return self.policy.given(batch.labels)

    def _drawn(self, batch: Batch, captions: Captions, noise: Noise) -> tuple[Paths, Tensor]:
        """Return paths without advantages, and the images that they end in, [B * G, 3, H, W] in [0, 1]."""
        renderer, group, images = self.flow.renderer, self.flow.objective.group, batch.images
        count = max(1, renderer.config.generator.micro_batch // group)
        parts, drawn = [], []
        for first in range(0, len(images), count):
            part = slice(first, first + count)
            own = replace(noise, sample_ids=noise.sample_ids[part])
            texts = captions.texts[part]
            full, empty = (renderer.condition(t, images[part], own) for t in (texts, [""] * len(texts)))
            window = self.flow.sample(full, empty, renderer.noise(images[part], own), own)
            drawn.append(renderer.decoded(window.x))
            parts.append((window.states, full, empty))
            beat()
        states, full, empty = (torch.cat(of) for of in zip(*parts, strict=True))
        return Paths(states, full, empty, states.new_zeros(len(states))), torch.cat(drawn)

    def _scored(self, paths: Paths) -> Paths:
        """Add what the loss compares with."""
        objective = self.flow.objective
        if objective.updates > 1:
            # With one update per rollout they are those of the forward pass itself.
            paths = replace(paths, logp_old=self.flow.score(paths, self.flow.transitions(paths)))
        if objective.beta:
            means = [step.mean for step in self.flow.transitions(paths, reference=True)]
            paths = replace(paths, means=torch.stack(means, 1))
        return paths


class ColdStartRollouts:
    """Captions of images, and the sampler's way up to where its gradient begins. A function of weights and samples."""

    def __init__(self, policy: Policy, renderer: Renderer, objective: ColdStart, instruction: str, seed: int):
        self.policy, self.renderer, self.objective = policy, renderer, objective
        self.instruction, self.seed = instruction, seed

    @torch.no_grad()
    def __call__(self, batches: Sequence[Batch], step: int) -> Prepared:
        with evaluating(self.policy.model):
            started = time.monotonic()
            made = [self._made(batch, step) for batch in batches]
            return Prepared(made, {"rollout": time.monotonic() - started})

    def _made(self, batch: Batch, step: int) -> Batch:
        renderer, images = self.renderer, batch.images
        noise = Noise(self.seed, step, batch.sample_ids, images.device)
        captions = self.policy.sample(self.instruction, images, noise, 1, self.objective.temperature)
        beat()
        prompts, sees = renderer.prompts(captions.texts, images)
        full = renderer.read(prompts, sees, images, noise)
        empty = renderer.condition([""] * len(images), images, noise)
        x, ts = renderer.noise(images, noise), renderer.times
        x = euler(renderer.velocity(full, empty), x, ts[: len(ts) - self.objective.last])
        lengths = torch.tensor([float(len(tokens)) for tokens in captions.tokens], device=images.device)
        paths = Paths(x[:, None], full, empty, x.new_zeros(len(x)), measures={"length": lengths})
        return replace(batch, prompts=prompts, paths=paths)
