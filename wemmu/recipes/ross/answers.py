"""Generates a VLM's answers, and the images that its head reconstructs."""

from typing import Any

import torch
from torch import Tensor

from wemmu.noise import Noise
from wemmu.positions import token_grid
from wemmu.prompts import PromptEncoder
from wemmu.recipes.ross.config import Denoiser
from wemmu.recipes.tuned_vlm import LIMIT, answers, question_rows
from wemmu.sampling.mode import in_eval_mode
from wemmu.sampling.request import GenerationRequest
from wemmu.sampling.solvers import ddim


class Answerer:
    """Asks a `Ross` model (anything with its `inputs`, `language_model`, `logits`, `states`, `head` and `targets`)."""

    def __init__(self, model: Any, encoder: PromptEncoder, device: torch.device | str = "cpu"):
        self.model, self.encoder, self.device = model, encoder, torch.device(device)

    def answers(self, request: GenerationRequest, limit: int = LIMIT) -> list[str]:
        """Decode greedily, up to `limit` tokens."""
        return answers(self.model, self.encoder, request, self.device, limit)

    @in_eval_mode
    def restored(self, request: GenerationRequest, steps: int, seed: int) -> Tensor:
        """Reconstruct pixels [B, N, 3, H', W'], nominally in [-1, 1]; a denoising head uses `steps` of DDIM."""
        model, images = self.model, request.images.to(self.device)
        b, n = images.shape[:2]
        inputs = images.flatten(0, 1)
        prompts = self.encoder.pad(*question_rows(self.encoder, request.texts, request.images, model.token_px))
        states = model.states(prompts.to(self.device), images).images.flatten(0, 1).float()
        height, width = images.shape[-2:]
        grid, head = token_grid(height, width, model.token_px), model.config.head
        if not isinstance(head, Denoiser):
            return model.targets.image(model.head(states, grid), inputs).unflatten(0, (b, n))
        channels = model.head.out.out_features
        z = Noise(seed, 0, request.sample_ids, self.device).normal("restore", (n, channels, *grid)).flatten(0, 1)
        z_0 = ddim(lambda z_t, t: model.head(z_t, t, states), z, head.timesteps, steps)
        return model.targets.image(z_0, inputs).unflatten(0, (b, n))
