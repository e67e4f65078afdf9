"""The decoder of the auto-encoder: captions -> images, by the generator."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from wemmu.backbones.vlm import VLM
from wemmu.heartbeat import beat
from wemmu.noise import Noise
from wemmu.positions import token_grid
from wemmu.prompts import PromptEncoder
from wemmu.recipes.uae.config import UAE as UAEConfig
from wemmu.recipes.uae.model import UAE
from wemmu.sampling.guidance import guided_velocity
from wemmu.sampling.solvers import euler, times
from wemmu.timesteps import VelocityField
from wemmu.types import Condition, Prompts


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
        with self.model.generator.at_work(images.device):
            for first in range(0, len(captions), step):
                part = slice(first, first + step)
                made.append(self._render(captions[part], images[part], sample_ids[part]))
                beat()
        return torch.cat(made)

    def _render(self, captions: Sequence[str], images: Tensor, sample_ids: Tensor) -> Tensor:
        noise = Noise(self.config.generator.seed, 0, sample_ids, images.device)
        full, empty = (self.condition(texts, images, noise) for texts in (captions, [""] * len(captions)))
        return self.decoded(euler(self.velocity(full, empty), self.noise(images, noise), self.times))

    @property
    def times(self) -> Tensor:
        """The times of the sampler's steps, [steps + 1]."""
        return times(self.config.generator.steps, self.config.generator.shift)

    @property
    def schedule(self) -> list[float]:
        """The same times, which do not depend on tensors: `wemmu.measuring` has none with numbers."""
        steps, shift = self.config.generator.steps, self.config.generator.shift
        return [1.0, *(shift * t / (1 + (shift - 1) * t) for t in (1 - i / steps for i in range(1, steps + 1)))]

    def noise(self, images: Tensor, noise: Noise) -> Tensor:
        """Return x at t = 1, float32 [B, C, h, w], of images of this size."""
        vae, (height, width) = self.model.generator.vae, images.shape[-2:]
        return noise.normal("latent", (vae.latent_channels, height // vae.latent_px, width // vae.latent_px))

    def decoded(self, x_0: Tensor) -> Tensor:
        """Decode latents [N, C, h, w] to images in [0, 1], float32 [N, 3, H, W], with gradient to the latents."""
        pixels: Tensor = self.model.generator.vae.decode_with_gradient(x_0)
        return (pixels.float() / 2 + 0.5).clamp(0, 1)

    def velocity(self, full: Tensor, empty: Tensor, reference: bool = False) -> VelocityField:
        """Return the guided velocity, v_empty + w (v_full - v_empty), of states of the condition, [B, Q, C_y].

        reference: of the DiT that the stage began with.
        """
        w = self.config.generator.guidance
        branches = [(full, 1.0)] if w == 1 else [(full, w), (empty, 1 - w)]
        return guided_velocity(partial(self.model.velocity, reference=reference), branches)

    def condition(self, captions: Sequence[str], images: Tensor, noise: Noise) -> Tensor:
        """Return states of the condition, [B, Q, C_y], for captions, whose length does not matter; "" is no caption."""
        return self.read(*self.prompts(captions, images), images, noise)

    def prompts(self, captions: Sequence[str], images: Tensor) -> tuple[Prompts, bool]:
        """Return what the generator's VLM reads, and whether it sees the images."""
        height, width = images.shape[-2:]
        grid = token_grid(height, width, self.reader.token_px)
        sees = self.config.condition == "in_context" and any(captions)
        if not sees:
            return self.encoder(captions, [[]] * len(captions)).to(images.device), False
        asked = self.encoder.token_ids(self.config.instruction, [grid])
        rows = [[*asked, *self.encoder.answer_ids(caption), self.encoder.vision_start_id] for caption in captions]
        return self.encoder.pad(rows, [[grid]] * len(rows)).to(images.device), True

    @property
    def reader(self) -> VLM:
        """The VLM whose keys and values are the condition."""
        return self.model if self.config.cond_encoder == "policy" else self.model.generator.vlm

    def read(self, prompts: Prompts, sees: bool, images: Tensor, noise: Noise, with_gradient: bool = False) -> Tensor:
        """Return states of the condition of `prompts`. with_gradient: to the VLM that reads, which is in eval mode."""
        generator, reader = self.model.generator, self.reader
        height, width = images.shape[-2:]
        grid = token_grid(height, width, reader.token_px)
        prefix = (reader.prefix_with_gradient if with_gradient else reader.prefix)(
            prompts, images if sees else images[:, :0]
        )
        # The image goes through the VLM only: the VAE branch would hand it over pixel by pixel.
        prefix = replace(prefix, image_positions=prefix.image_positions[..., :0])
        condition: Condition = generator.bridge(prefix, generator.input_latents(images[:, :0]), grid, noise)
        return condition.states
