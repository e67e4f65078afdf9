"""A step of UAE for `wemmu.measuring`: rollout, rendering and update of one batch, without tokenizer."""

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from wemmu.config.schema import StageRun
from wemmu.noise import Noise
from wemmu.positions import token_grid
from wemmu.prompts import PromptEncoder
from wemmu.recipes.uae.config import UAE as UAEConfig
from wemmu.recipes.uae.config import ColdStart, FlowGRPO, Reward, UnifiedGRPO
from wemmu.recipes.uae.generator import Renderer
from wemmu.recipes.uae.model import UAE
from wemmu.recipes.uae.paths import learner_of
from wemmu.recipes.uae.policy import Policy
from wemmu.sampling.mode import in_eval_mode
from wemmu.sampling.solvers import euler
from wemmu.types import Batch, Losses, Paths, Prompts, Rollout


class Measured:
    """The loss of a stage on one batch, after the rollout and rendering of the step.

    Captions are as long as the labels. They are read at once, with a cache of keys and values: the FLOPs of writing
    them token by token, and the memory at their end. The encoder that rewards has other weights and is not measured.
    """

    def __init__(self, run: StageRun, model: UAE):
        assert isinstance(run.recipe, UAEConfig)
        config = run.recipe.model_copy(update={"reward": Reward(encoder="pixels")})
        self.model, self.config, self.objective = model, config, run.stage.objective
        # They read no text, and there may be no tokenizer.
        unread = cast(PromptEncoder, None)
        policy, self.renderer = Policy(model, unread, config.max_length), Renderer(model, unread, config)
        policy.banned = torch.zeros(model.vlm.lm_head.out_features, dtype=torch.bool)
        self.loss = learner_of(run, policy, self.renderer)

    def __call__(self, batch: Batch, step: int) -> Losses:
        count, images = len(batch.images), batch.images
        match self.objective:
            case UnifiedGRPO() as objective:
                batch = self._rolled_out(batch, objective)
                self._generated(batch.prompts, images.repeat_interleave(objective.group, 0))
                self._rendered(batch, count * objective.group)
            case FlowGRPO() as objective:
                self._generated(batch.prompts, images)
                self._rendered(batch, count * objective.group)
                batch = self._drawn(batch, count * objective.group, objective.window + 1, objective.beta > 0)
            case ColdStart():
                self._generated(batch.prompts, images)
                self._rendered(batch, count)
                batch = self._drawn(batch, count, 1, False)
        return self.loss(batch, step)

    @in_eval_mode
    def _generated(self, prompts: Prompts, images: Tensor) -> None:
        self.model.prefix(prompts, images)

    @in_eval_mode
    def _rendered(self, batch: Batch, rows: int) -> None:
        """Draw `rows` images, some at a time."""
        several, lengths = self.config.generator.micro_batch, (self.config.max_length, 1)
        for first in range(0, rows, several):
            n = min(several, rows - first)
            images = batch.images[:1].expand(n, -1, -1, -1, -1)
            noise = Noise(0, 0, torch.arange(n), images.device)
            full, empty = (self.renderer.read(self._words(n, m), False, images, noise) for m in lengths)
            x = euler(self.renderer.velocity(full, empty), self.renderer.noise(images, noise), self.renderer.times)
            self.renderer.decoded(x)

    @staticmethod
    def _words(rows: int, length: int) -> Prompts:
        """Return prompts without images."""
        ids = torch.zeros(rows, length, dtype=torch.int64)
        return Prompts(
            ids, torch.ones_like(ids, dtype=torch.bool), torch.arange(length).repeat(3, rows, 1),
            torch.full((rows,), length), False, (0,) * rows,
        )  # fmt: skip

    def _drawn(self, batch: Batch, rows: int, states: int, refers: bool) -> Batch:
        generator, images = self.model.generator, batch.images
        height, width = images.shape[-2:]
        grid = generator.bridge.queries.grid(*token_grid(height, width, self.model.token_px))
        px, channels = generator.vae.latent_px, generator.vae.latent_channels
        dtype = self.model.vlm.dtype
        condition = torch.zeros(len(images), grid[0] * grid[1], generator.caption_channels, dtype=dtype)
        x = torch.zeros(rows, states, channels, height // px, width // px)
        means = x[:, 1:] if refers else None
        paths = Paths(x, condition, condition, x.new_zeros(rows), means=means)
        if isinstance(self.objective, ColdStart) and self.config.condition == "reencode":
            batch = replace(batch, prompts=self._words(len(images), self.config.max_length))
        return replace(batch, paths=paths)

    def _rolled_out(self, batch: Batch, objective: UnifiedGRPO) -> Batch:
        prompts, labels = batch.prompts, batch.labels
        assert labels is not None

        def repeated(tensor: Tensor, dim: int = 0) -> Tensor:
            return tensor.repeat_interleave(objective.group, dim)

        prompts = type(prompts)(
            repeated(prompts.input_ids), repeated(prompts.mask), repeated(prompts.positions, 1),
            repeated(prompts.next_position), prompts.padded,
            tuple(n for n in prompts.image_tokens for _ in range(objective.group)),
        )  # fmt: skip
        labels = repeated(labels)
        zeros = torch.zeros(labels.shape, device=labels.device)
        old, reference = (zeros if kept else None for kept in (objective.updates > 1, objective.beta > 0))
        rollout = Rollout(zeros[:, 0], 1.0, old, reference, {})
        return replace(batch, prompts=prompts, labels=labels, rollout=rollout)
