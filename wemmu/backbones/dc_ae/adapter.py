"""The deep-compression autoencoder: deterministic latents, scaled by one factor."""

from typing import Any

from diffusers.models import AutoencoderDC
from torch import Tensor

from wemmu.backbones.adapters import AutoencoderAdapter
from wemmu.backbones.dc_ae import published


class DCAE(AutoencoderAdapter):
    model_class, facts = AutoencoderDC, published

    def encode(self, vae: Any, x: Tensor) -> Tensor:
        return vae.encode(x.to(vae.dtype)).latent * vae.config["scaling_factor"]

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode((latents / vae.config["scaling_factor"]).to(vae.dtype)).sample


ADAPTER = DCAE()
