"""The KL autoencoder of Stable Diffusion 1 to 3 and FLUX: latents are shifted, where the config says so, and scaled."""

from diffusers.models import AutoencoderKL
from torch import Tensor, nn


class KLAutoencoder:
    """See `wemmu.backbones.adapters.AutoencoderAdapter`."""

    model_class = AutoencoderKL

    def geometry(self, vae: AutoencoderKL) -> tuple[int, int]:
        # Each level of the encoder but the last one halves the sides.
        return vae.config["latent_channels"], 2 ** (len(vae.config["block_out_channels"]) - 1)

    def scaling_factor(self, vae: AutoencoderKL) -> float:
        return vae.config["scaling_factor"]

    def encode(self, vae: AutoencoderKL, x: Tensor) -> Tensor:
        # Not a sample of the distribution: latents must be the same every time.
        latents = vae.encode(x.to(vae.dtype)).latent_dist.mode()
        return (latents - _shift(vae)) * vae.config["scaling_factor"]

    def decode(self, vae: AutoencoderKL, latents: Tensor) -> Tensor:
        return vae.decode((latents / vae.config["scaling_factor"] + _shift(vae)).to(vae.dtype)).sample

    def compilable(self, vae: AutoencoderKL) -> tuple[nn.Module, ...]:
        return (vae.encoder,)


def _shift(vae: AutoencoderKL) -> float:
    """FLUX and Stable Diffusion 3 have one; the config of earlier ones says null."""
    return vae.config["shift_factor"] or 0.0


ADAPTER = KLAutoencoder()
