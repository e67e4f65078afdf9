"""The frozen autoencoder: pixels <-> scaled latents."""

from typing import Any

import torch
from torch import Tensor, nn

from wemmu.backbones.adapters import AutoencoderAdapter, adapter_of
from wemmu.backbones.cache import FeatureCache
from wemmu.backbones.offload import Offloadable
from wemmu.backbones.patches import resize


class FrozenVAE(Offloadable):
    vae: Any  # a class of diffusers

    def __init__(self, vae: nn.Module):
        super().__init__()
        self.vae = vae.eval().requires_grad_(False)
        self.adapter: AutoencoderAdapter = adapter_of(vae)
        self.scaling_factor = self.adapter.scaling_factor(vae)
        self.latent_channels, self.latent_px = self.adapter.geometry(vae)
        self.cache = FeatureCache()

    def train(self, mode: bool = True) -> "FrozenVAE":
        """Stay in eval mode: a frozen model has no training behaviour."""
        return super().train(False)

    def channels_last(self) -> None:
        """Keep the weights of 2D convolutions with channels last in memory; one for videos has 3D ones, too."""
        for part in self.vae.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.data = part.weight.data.to(memory_format=torch.channels_last)

    def compilable(self) -> tuple[nn.Module, ...]:
        """Return the modules of the encoder that torch.compile can take."""
        return self.adapter.compilable(self.vae)

    @torch.no_grad()
    def encode(self, pixels: Tensor, grid: tuple[int, int] | None = None) -> Tensor:
        """Encode uint8 [B, 3, H, W] as latents [B, C, h, w] of about unit variance.

        With `grid` = (rows, columns), resize the image first so that it has this many latents.
        """

        def encode(pixels: Tensor) -> Tensor:
            size = pixels.shape[-2:] if grid is None else (grid[0] * self.latent_px, grid[1] * self.latent_px)
            with self.at_work(pixels.device):
                # Convolutions in channels_last hand their order on; what follows has its own.
                return self.adapter.encode(self.vae, resize(pixels, *size) / 127.5 - 1).contiguous()

        # Without resizing, an input shares its cached latents with the target of the same image.
        own = tuple(side // self.latent_px for side in pixels.shape[-2:])
        return self.cache(encode, pixels, None if grid == own else grid)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents [B, C, h, w] to pixels [B, 3, H, W], nominally in [-1, 1]."""
        return self.decode_with_gradient(latents)

    def decode_with_gradient(self, latents: Tensor) -> Tensor:
        """Decode as `decode` does, with gradient to the latents."""
        with self.at_work(latents.device):
            return self.adapter.decode(self.vae, latents)
