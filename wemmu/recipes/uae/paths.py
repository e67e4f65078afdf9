"""Learners that use the sampler's path of captioned images: Flow-GRPO and cold starts of the generator."""

import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from wemmu.backbones.encoders import cosine
from wemmu.config.schema import StageRun
from wemmu.heartbeat import beat
from wemmu.noise import Noise
from wemmu.objectives.flow_grpo import divergence, log_probability
from wemmu.objectives.grpo import clipped, surrogate
from wemmu.recipes.uae.config import CaptionTuning, ColdStart, FlowGRPO, UnifiedGRPO
from wemmu.recipes.uae.generator import Renderer
from wemmu.recipes.uae.learner import CaptionLearner, GRPOLearner, RolloutLearner, measures
from wemmu.recipes.uae.policy import Captions, Policy
from wemmu.recipes.uae.reward import ReconstructionReward
from wemmu.sampling.mode import evaluating
from wemmu.sampling.sde import Transition, Window, sample, transition
from wemmu.sampling.solvers import euler
from wemmu.types import Batch, Losses, Paths, Prepared


class FlowLearner(RolloutLearner):
    """The sampler as a policy: its random steps and their log-probabilities; one loss per image.

    The loss is the clipped one over the stochastic steps of paths; see `wemmu.objectives.flow_grpo`.
    """

    objective: FlowGRPO

    @property
    def steps(self) -> range:
        """The stochastic steps of the sampler."""
        return range(self.objective.first, self.objective.first + self.objective.window)

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
        t = torch.tensor([ts[i] for i in self.steps]).to(x.device, non_blocking=True).repeat(len(x))
        v = self.renderer.velocity(full, empty, reference)(x.flatten(0, 1), t).unflatten(0, (-1, count))
        return [
            transition(objective.sde, v[:, w], x[:, w], ts[i], ts[i + 1], objective.noise_level)
            for w, i in enumerate(self.steps)
        ]

    def score(self, paths: Paths, steps: Sequence[Transition]) -> Tensor:
        """Return the log-probabilities of the paths' steps, float32 [B * G, W]."""
        after = paths.states[:, 1:].unbind(1)
        return torch.stack([log_probability(x, *step) for x, step in zip(after, steps, strict=True)], 1)

    def _made(self, batches: Sequence[Batch], step: int) -> Prepared:
        times = [time.monotonic()]
        noises = [self._noise(batch, step) for batch in batches]
        captions = [self._captions(batch, noise) for batch, noise in zip(batches, noises, strict=True)]
        times.append(time.monotonic())
        drawn = [self._drawn(*one) for one in zip(batches, captions, noises, strict=True)]
        times.append(time.monotonic())
        rewarded = []
        for (_, images), batch in zip(drawn, batches, strict=True):
            rewarded.append(self.reward.compared(images, batch.images))
            beat()
        times.append(time.monotonic())
        made, found, limit = [], self._advantages([values for values, _ in rewarded]), self.objective.limit
        for batch, one, (paths, _), (values, also), part in zip(batches, captions, drawn, rewarded, found, strict=True):
            device = batch.images.device
            recorded = {name: value.to(device) for name, value in measures(one, values, also).items()}
            paths = replace(paths, advantages=part.clamp(-limit, limit).flatten().to(device), measures=recorded)
            made.append(replace(batch, paths=self._scored(paths)))
            beat()
        names = ("caption", "rollout", "reward")
        return Prepared(made, {name: b - a for name, (a, b) in zip(names, pairwise(times), strict=True)})

    def _captions(self, batch: Batch, noise: Noise) -> Captions:
        """Return one caption of each image.

        Raises:
            ValueError: if it is the data set's, and a record has none.
        """
        objective = self.objective
        if objective.captions == "policy":
            found = self.policy.sample(self.instruction, batch.images, noise, 1, objective.temperature)
            beat()
            return found
        if batch.labels is None:
            raise ValueError(
                "objective.captions: data needs captions, and a record of the batch has none; valid: policy"
            )
        return self.policy.given(batch.labels)

    def _drawn(self, batch: Batch, captions: Captions, noise: Noise) -> tuple[Paths, Tensor]:
        """Return paths without advantages, and the images that they end in, [B * G, 3, H, W] in [0, 1]."""
        renderer, images = self.renderer, batch.images
        count = max(1, renderer.config.generator.micro_batch // self.objective.group)
        parts, drawn = [], []
        for first in range(0, len(images), count):
            part = slice(first, first + count)
            own = replace(noise, sample_ids=noise.sample_ids[part])
            texts = captions.texts[part]
            full, empty = (renderer.condition(t, images[part], own) for t in (texts, [""] * len(texts)))
            window = self.sample(full, empty, renderer.noise(images[part], own), own)
            drawn.append(renderer.decoded(window.x))
            parts.append((window.states, full, empty))
            beat()
        states, full, empty = (torch.cat(of) for of in zip(*parts, strict=True))
        return Paths(states, full, empty, states.new_zeros(len(states))), torch.cat(drawn)

    def _scored(self, paths: Paths) -> Paths:
        """Add what the loss compares with."""
        if self.period > 1:
            # With one update per rollout they are those of the forward pass itself.
            paths = replace(paths, logp_old=self.score(paths, self.transitions(paths)))
        if self.objective.beta:
            means = [step.mean for step in self.transitions(paths, reference=True)]
            paths = replace(paths, means=torch.stack(means, 1))
        return paths

    def __call__(self, batch: Batch, step: int) -> Losses:
        paths, objective = batch.paths, self.objective
        assert paths is not None, "`prepare` adds them"
        steps = self.transitions(paths)
        logp = self.score(paths, steps)
        old = logp.detach() if paths.logp_old is None else paths.logp_old
        each = surrogate(logp, old, paths.advantages, objective.clip, objective.clip)
        below, above = clipped(logp.detach(), old, paths.advantages, objective.clip, objective.clip)
        recorded = {"ratio": (logp.detach() - old).exp(), "clipped_low": below.float(), "clipped_high": above.float()}
        if paths.means is not None:
            pairs = zip(steps, paths.means.unbind(1), strict=True)
            kl = torch.stack([divergence(step.mean, mean, step.std) for step, mean in pairs], 1)
            each = each + objective.beta * kl
            recorded["kl"] = kl.detach()

        def of_images(values: Tensor) -> Tensor:
            return values.mean(1).unflatten(0, (len(batch.images), -1)).mean(1)

        parts = {**paths.measures, **{name: of_images(value) for name, value in recorded.items()}}
        return Losses.of_task(batch.task, of_images(each), parts)


class ColdStartLearner(CaptionLearner):
    """1 - cosine of image and reconstruction, one value per image, with gradient through the sampler's last steps."""

    def __init__(self, policy: Policy, renderer: Renderer, objective: ColdStart, run: StageRun):
        super().__init__(policy, run)
        self.renderer, self.objective = renderer, objective
        # Whether the VLM that conditions the generator learns, so that the condition has a gradient.
        self.reads = "llm" in run.stage.trains
        self.encoder: Any = renderer.model.encoders["reward"]

    def prepare(self, batches: Sequence[Batch], step: int) -> Prepared:
        """Caption the images and sample up to where the gradient begins, depending on weights and samples only."""
        started = time.monotonic()
        with evaluating(self.policy.model):
            made = [self._made(batch, step) for batch in batches]
        return Prepared(made, {"rollout": time.monotonic() - started})

    def _made(self, batch: Batch, step: int) -> Batch:
        renderer, images = self.renderer, batch.images
        noise = self._noise(batch, step)
        captions = self.policy.sample(renderer.config.instruction, images, noise, 1, self.objective.temperature)
        beat()
        prompts, sees = renderer.prompts(captions.texts, images)
        full = renderer.read(prompts, sees, images, noise)
        empty = renderer.condition([""] * len(images), images, noise)
        x, ts = renderer.noise(images, noise), renderer.times
        x = euler(renderer.velocity(full, empty), x, ts[: len(ts) - self.objective.last])
        lengths = torch.tensor([float(len(tokens)) for tokens in captions.tokens], device=images.device)
        paths = Paths(x[:, None], full, empty, x.new_zeros(len(x)), measures={"length": lengths})
        return replace(batch, prompts=prompts, paths=paths)

    def __call__(self, batch: Batch, step: int) -> Losses:
        paths, renderer, images = batch.paths, self.renderer, batch.images
        assert paths is not None, "`prepare` adds them"
        full = paths.full
        if self.reads:
            noise = self._noise(batch, step)
            sees = renderer.config.condition == "in_context"
            with evaluating(renderer.model), torch.enable_grad():
                full = renderer.read(batch.prompts, sees, images, noise, with_gradient=True)
        velocity = renderer.velocity(full, paths.empty)
        made = renderer.decoded(euler(velocity, paths.states[:, 0], renderer.times[-1 - self.objective.last :]))
        with torch.no_grad():
            targets = self.encoder.embed(images[:, 0].float() / 255)
        cosines = cosine(self.encoder.embed(made), targets)
        return Losses.of_task(batch.task, 1 - cosines, {**paths.measures, "reward": cosines.detach()})


def learner_of(run: StageRun, policy: Policy, renderer: Renderer) -> CaptionLearner:
    """Return what the stage's objective learns by."""
    match run.stage.objective:
        case UnifiedGRPO() as objective:
            return GRPOLearner(policy, ReconstructionReward(renderer), objective, run)
        case FlowGRPO() as objective:
            return FlowLearner(policy, ReconstructionReward(renderer), objective, run)
        case ColdStart() as objective:
            return ColdStartLearner(policy, renderer, objective, run)
        case objective:
            assert isinstance(objective, CaptionTuning), "the config gives this recipe no other"
            return CaptionLearner(policy, run)
