"""The frozen autoencoder: pixels <-> scaled latents."""

import torch
from diffusers import AutoencoderDC
from torch import Tensor

from wemmu.models.cache import FeatureCache
from wemmu.models.patches import resize


class FrozenVAE(torch.nn.Module):
    def __init__(self, vae: AutoencoderDC):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.scaling_factor: float = vae.config.scaling_factor
        self.latent_channels: int = vae.config.latent_channels
        self.cache = FeatureCache()
        self.latent_px: int = vae.spatial_compression_ratio

    def train(self, mode: bool = True) -> "FrozenVAE":
        """Stays in eval mode whatever is asked: a frozen model has no training behaviour."""
        return super().train(False)

    @torch.no_grad()
    def encode(self, pixels: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """uint8 [B, 3, H, W] -> latents [B, C, h, w] of about unit variance.

        With `grid` = (rows, columns) the picture is resized first, so that it has exactly that many latents.
        """

        def encode(pixels: Tensor) -> Tensor:
            size = pixels.shape[-2:] if grid is None else (grid[0] * self.latent_px, grid[1] * self.latent_px)
            x = resize(pixels, *size) / 127.5 - 1
            return self.vae.encode(x.to(self.vae.dtype)).latent * self.scaling_factor

        # A picture whose grid is its own needs no resizing, so it shares its latents with the target of that picture.
        own = tuple(side // self.latent_px for side in pixels.shape[-2:])
        return self.cache(encode, pixels, None if grid == own else grid)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, h, w] -> pixels [B, 3, H, W], nominally in [-1, 1]."""
        return self.vae.decode((latents / self.scaling_factor).to(self.vae.dtype)).sample
