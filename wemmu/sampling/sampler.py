"""From a request to images: prefixes and conditions once, then the solver over guided velocities."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from wemmu.config.schema import Sampling
from wemmu.noise import Noise
from wemmu.positions import token_grid
from wemmu.prompts import PromptEncoder
from wemmu.sampling.guidance import Branch, guidance_weights, guided_velocity, wordless
from wemmu.sampling.mode import in_eval_mode
from wemmu.sampling.request import GenerationRequest
from wemmu.sampling.solvers import SOLVERS, OnStep, Solver, keep, times
from wemmu.types import Condition


class Sampler:
    """Draws images from a `WeMMU` model (anything with its `condition`, `velocity` and `vae`).

    solvers: the solver of each name that a config can choose. device: where the model is; None: where a request's
    images are.
    """

    def __init__(
        self,
        model: Any,
        encoder: PromptEncoder,
        shift: float,
        solvers: Mapping[str, Solver] = SOLVERS,
        device: torch.device | str | None = None,
    ):
        self.model, self.encoder, self.shift, self.solvers, self.device = model, encoder, shift, solvers, device

    @in_eval_mode
    def __call__(self, request: GenerationRequest, sampling: Sampling, on_step: OnStep = keep) -> Tensor:
        """Generate pixels [B, 3, height, width], nominally in [-1, 1]. Raises like `latents`."""
        return self.model.vae.decode(self.latents(request, sampling, on_step))

    @in_eval_mode
    def latents(self, request: GenerationRequest, sampling: Sampling, on_step: OnStep = keep) -> Tensor:
        """Generate the latents [B, C, h, w] of the images.

        Raises:
            ValueError: if the size is not a multiple of the latent's.
        """
        latent_px = self.model.vae.latent_px
        if request.size[0] % latent_px or request.size[1] % latent_px:
            raise ValueError(f"height and width must be multiples of {latent_px} px, got {request.size}")
        if self.device is not None:
            request = replace(request, images=request.images.to(self.device))
        noise = Noise(sampling.seed, 0, request.sample_ids, request.images.device)
        weights = guidance_weights(request.task, sampling)
        # One Prefix and one Condition for each branch serve every step of the solver.
        conditions = [self._condition(branch, request, noise) for branch in weights]
        source = _sources(conditions)
        velocity = guided_velocity(
            lambda x, t, states: self.model.velocity(x, t, Condition(states, source)),
            [(condition.states, weight) for condition, weight in zip(conditions, weights.values(), strict=True)],
        )
        shape = (self.model.vae.latent_channels, request.size[0] // latent_px, request.size[1] // latent_px)
        x_1 = noise.normal("latent", shape)
        return self.solvers[sampling.solver](velocity, x_1, times(sampling.steps, self.shift), on_step)

    def _condition(self, branch: Branch, request: GenerationRequest, noise: Noise) -> Condition:
        texts, images, sizes = request.texts, request.images, request.sizes
        if branch is not Branch.FULL:
            negative = request.negatives and branch is wordless(request.task)
            texts = request.negatives if negative else [""] * len(texts)
        if branch is Branch.UNCONDITIONAL:
            images, sizes = images[:, :0], None
        every = sizes or [[(images.shape[-2], images.shape[-1])] * images.shape[1]] * len(texts)
        grids = [[token_grid(*size, self.model.vlm.token_px) for size in row] for row in every]
        prompts = self.encoder(texts, grids).to(images.device)
        return self.model.condition(prompts, images, request.size, noise, task=request.task, sizes=sizes)


def _sources(conditions: Sequence[Condition]) -> Tensor | None:
    """The source latents of branches that the DiT runs together; zeros for branches without."""
    given = [condition.source for condition in conditions if condition.source is not None]
    if not given:
        return None
    return torch.cat([torch.zeros_like(given[0]) if c.source is None else c.source for c in conditions])
