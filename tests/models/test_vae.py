"""The frozen autoencoder: pixels are prepared in float32, whatever it computes in."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC
from torch import Tensor

from tests.models.world import random_images
from wemmu.backbones.vae import FrozenVAE
from wemmu.config.schema import Backbones


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=str)
def vae(backbones: Backbones, request: pytest.FixtureRequest) -> FrozenVAE:
    return FrozenVAE(AutoencoderDC.from_pretrained(backbones.vae, torch_dtype=request.param))


def given(vae: FrozenVAE, part: torch.nn.Module, call) -> Tensor:
    """What the encoder or the decoder is given on the way."""
    caught: list[Tensor] = []
    hook = part.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    try:
        call()
    finally:
        hook.remove()
    return caught[0]


@pytest.mark.parametrize("grid", [None, (3, 3), (4, 2)], ids=str)
def test_pixels_are_resized_cut_off_and_scaled_exactly_and_rounded_once(vae: FrozenVAE, grid):
    edges = torch.where(torch.arange(32) % 16 < 8, 255, 0).to(torch.uint8).expand(3, 32, 32)
    images = torch.stack([edges, random_images(0, 3, 32, 32)])
    exact = images.double()
    if grid is not None:
        size = (grid[0] * vae.latent_px, grid[1] * vae.latent_px)
        exact = F.interpolate(exact, size, mode="bicubic", antialias=True)
        assert exact.max() > 256, "nothing overshoots, so this proves less"
    exact = exact.clamp(0, 255) / 127.5 - 1
    seen = given(vae, vae.vae.encoder, lambda: vae.encode(images, grid))
    assert seen.dtype == vae.vae.dtype
    assert seen.abs().max() <= 1
    # The nearest number of its type, up to the last bits of float32.
    unit = torch.finfo(seen.dtype).eps / 2
    assert ((seen.double() - exact).abs() <= unit * exact.abs() + 1e-5).all()


def test_latents_of_float32_are_rounded_once(vae: FrozenVAE):
    latents = torch.randn(1, vae.latent_channels, 2, 2, generator=torch.Generator().manual_seed(0))
    seen = given(vae, vae.vae.decoder, lambda: vae.decode(latents))
    assert torch.equal(seen, (latents / vae.scaling_factor).to(vae.vae.dtype))
