"""The deep-compression autoencoder: deterministic latents, scaled by one factor."""

from diffusers.models import AutoencoderDC
from torch import Tensor, nn


class DCAE:
    """See `wemmu.backbones.adapters.AutoencoderAdapter`."""

    model_class = AutoencoderDC

    def geometry(self, vae: AutoencoderDC) -> tuple[int, int]:
        return vae.config["latent_channels"], vae.spatial_compression_ratio

    def scaling_factor(self, vae: AutoencoderDC) -> float:
        return vae.config["scaling_factor"]

    def encode(self, vae: AutoencoderDC, x: Tensor) -> Tensor:
        return vae.encode(x.to(vae.dtype)).latent * vae.config["scaling_factor"]

    def decode(self, vae: AutoencoderDC, latents: Tensor) -> Tensor:
        return vae.decode((latents / vae.config["scaling_factor"]).to(vae.dtype)).sample

    def compilable(self, vae: AutoencoderDC) -> tuple[nn.Module, ...]:
        return (vae.encoder,)


ADAPTER = DCAE()
