"""The KL autoencoder of Stable Diffusion 1 to 3 and FLUX: latents are scaled, and shifted if the config says so."""

from typing import Any

from diffusers.models import AutoencoderKL
from torch import Tensor

from wemmu.backbones.adapters import AutoencoderAdapter
from wemmu.backbones.autoencoder_kl import published


class KLAutoencoder(AutoencoderAdapter):
    model_class, facts = AutoencoderKL, published

    def encode(self, vae: Any, x: Tensor) -> Tensor:
        # Not a sample of the distribution: latents must be the same every time.
        latents = vae.encode(x.to(vae.dtype)).latent_dist.mode()
        return (latents - _shift(vae)) * vae.config["scaling_factor"]

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        return vae.decode((latents / vae.config["scaling_factor"] + _shift(vae)).to(vae.dtype)).sample


def _shift(vae: Any) -> float:
    """FLUX and Stable Diffusion 3 have one; the config of earlier ones says null."""
    return vae.config["shift_factor"] or 0.0


ADAPTER = KLAutoencoder()
