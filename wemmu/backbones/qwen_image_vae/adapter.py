"""The autoencoder of Qwen-Image, for videos; an image is one frame. Latents are normalised by channel."""

from typing import Any

import torch
from diffusers.models import AutoencoderKLQwenImage
from torch import Tensor, nn

from wemmu.backbones.adapters import AutoencoderAdapter
from wemmu.backbones.qwen_image_vae import published


class QwenImageVAE(AutoencoderAdapter):
    model_class, facts = AutoencoderKLQwenImage, published

    def scaling_factor(self, vae: Any) -> float:
        """Return the mean over the channels, each of which has its own."""
        return float((1 / torch.tensor(vae.config["latents_std"])).mean())

    def encode(self, vae: Any, x: Tensor) -> Tensor:
        # Not a sample of the distribution: latents must be the same every time.
        latents = vae.encode(x.to(vae.dtype)[:, :, None]).latent_dist.mode()[:, :, 0]
        mean, std = _statistics(vae, latents)
        return (latents - mean) / std

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = _statistics(vae, latents)
        return vae.decode((latents * std + mean).to(vae.dtype)[:, :, None]).sample[:, :, 0]

    def compilable(self, vae: Any) -> tuple[nn.Module, ...]:
        # Its convolutions keep the frames before in lists, at which every graph would break.
        return ()


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, ...]:
    """Return mean and standard deviation of each channel [C, 1, 1], as `latents` are stored."""
    both = vae.config["latents_mean"], vae.config["latents_std"]
    return tuple(torch.tensor(values, dtype=latents.dtype, device=latents.device)[:, None, None] for values in both)


ADAPTER = QwenImageVAE()
