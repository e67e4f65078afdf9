"""The decoder of the auto-encoder: captions -> images, by the frozen generator."""

from collections.abc import Sequence

import torch
from torch import Tensor

from wemmu.backbones.vlm import VLM
from wemmu.heartbeat import beat
from wemmu.noise import Noise
from wemmu.positions import token_grid
from wemmu.prompts import PromptEncoder
from wemmu.recipes.uae.config import UAE as UAEConfig
from wemmu.recipes.uae.model import UAE
from wemmu.sampling.solvers import euler, times
from wemmu.timesteps import VelocityField
from wemmu.types import Condition


class Renderer:
    """Renders captions with a `UAE` model's generator, a function of caption, sample, size and seed alone.

    The noise is keyed by the sample, so all captions of an image share it and differ by their words.
    """

    def __init__(self, model: UAE, encoder: PromptEncoder, config: UAEConfig):
        self.model, self.encoder, self.config = model, encoder, config

    @torch.no_grad()
    def __call__(self, captions: Sequence[str], images: Tensor, sample_ids: Tensor) -> Tensor:
        """Return reconstructions in [0, 1], float32 [N, 3, H, W], of the size of the images.

        images: uint8 [N, 1, 3, H, W], those that the captions are of. They only give the size, unless the condition is
        `in_context`. sample_ids: int64 [N].
        """
        made, step = [], self.config.generator.micro_batch
        for first in range(0, len(captions), step):
            part = slice(first, first + step)
            made.append(self._render(captions[part], images[part], sample_ids[part]))
            beat()
        return torch.cat(made)

    def _render(self, captions: Sequence[str], images: Tensor, sample_ids: Tensor) -> Tensor:
        config, vae = self.config.generator, self.model.generator.vae
        height, width = images.shape[-2:]
        noise = Noise(config.seed, 0, sample_ids, images.device)
        shape = (vae.latent_channels, height // vae.latent_px, width // vae.latent_px)
        full, empty = (self.condition(texts, images, noise) for texts in (captions, [""] * len(captions)))
        x_1, ts = noise.normal("latent", shape), times(config.steps, config.shift)
        x_0 = euler(self.velocity(full, empty), x_1, ts)
        return (vae.decode(x_0).float() / 2 + 0.5).clamp(0, 1)

    def velocity(self, full: Condition, empty: Condition) -> VelocityField:
        """Return the guided velocity, v_empty + w (v_full - v_empty)."""
        w, states = self.config.generator.guidance, torch.cat([full.states, empty.states])

        def guided(x: Tensor, t: Tensor) -> Tensor:
            if w == 1:
                return self.model.generator.velocity(x, t, full)
            v, v_empty = self.model.generator.velocity(x.repeat(2, 1, 1, 1), t.repeat(2), Condition(states)).chunk(2)
            return v_empty + w * (v - v_empty)

        return guided

    def condition(self, captions: Sequence[str], images: Tensor, noise: Noise) -> Condition:
        """Return the generator's condition for captions, whose length does not matter; "" is no caption."""
        generator, (height, width) = self.model.generator, images.shape[-2:]
        reader: VLM = self.model if self.config.cond_encoder == "policy" else generator.vlm
        grid = token_grid(height, width, reader.token_px)
        sees = self.config.condition == "in_context" and any(captions)
        if sees:
            asked = self.encoder.token_ids(self.config.instruction, [grid])
            rows = [[*asked, *self.encoder.answer_ids(caption), self.encoder.vision_start_id] for caption in captions]
            prompts = self.encoder.pad(rows, [[grid]] * len(rows))
        else:
            prompts = self.encoder(captions, [[]] * len(captions))
        prefix = reader.prefix(prompts.to(images.device), images if sees else images[:, :0])
        # The image goes through the VLM only: the VAE branch would hand it over pixel by pixel.
        return generator.bridge(prefix, generator.input_latents(images[:, :0]), grid, noise)
