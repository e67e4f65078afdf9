"""AutoencoderDC on the shapes world: reconstruct renders, with the weight on the shapes' pixels.

Without the weight the background, most of every image, decides the loss and the corners blur until shapes are
confused. Noise on the latents during training makes the decoder forgive what a diffusion model gets slightly wrong.
"""

import random
from functools import partial
from pathlib import Path

import torch
from diffusers.models import AutoencoderDC
from torch import Tensor

from tools.pretraining.loop import fit, held_out
from wemmu.pixels import to_images, to_pixels
from wemmu.shapes.backbones import HIGH_PX, LOW_PX, VAE_CONFIG
from wemmu.shapes.render import render
from wemmu.shapes.scene import BACKGROUNDS, Split, random_scene
from wemmu.shapes.scorer import same_scene

FOREGROUND_WEIGHT = 6.0
LATENT_NOISE = 0.15


def _batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, px, px] in [-1, 1] and the weight of each pixel [B, 1, px, px]."""
    rng = random.Random(f"vae-{step}")
    px = LOW_PX if step % 3 == 0 else HIGH_PX
    scenes = [random_scene(rng) for _ in range(size)]
    pixels = to_pixels([render(s, px) for s in scenes])
    empty = torch.stack([torch.tensor(BACKGROUNDS[s.background]) for s in scenes]).float() / 127.5 - 1
    foreground = ((pixels - empty[:, :, None, None]).abs().amax(1, keepdim=True) > 0.02).float()
    return pixels, 1 + (FOREGROUND_WEIGHT - 1) * foreground


@torch.no_grad()
def round_trip(vae: AutoencoderDC, split: Split, px: int, count: int = 256) -> float:
    """Share of renders whose scene is still read exactly after encode and decode."""
    rng = random.Random(f"vae-eval-{split}")
    scenes = [random_scene(rng, split) for _ in range(count)]
    pixels = to_pixels([render(s, px) for s in scenes])
    decoded = torch.cat([vae.decode(vae.encode(p).latent).sample for p in pixels.split(64)])
    return sum(same_scene(image, s) for image, s in zip(to_images(decoded), scenes, strict=True)) / count


def train(work: Path, steps: int, batch_size: int = 48) -> AutoencoderDC:
    torch.manual_seed(0)
    vae = AutoencoderDC(**VAE_CONFIG)
    print(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters", flush=True)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        pixels, weight = _batch(step, batch_size)
        z = vae.encode(pixels).latent
        rms = z.detach().square().mean().sqrt()
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(step))
        # Half of the batch is decoded from noisy latents, half as encoded.
        z_noisy = torch.cat([z[::2] + LATENT_NOISE * rms * noise[::2], z[1::2]])
        order = torch.cat([torch.arange(0, len(z), 2), torch.arange(1, len(z), 2)])
        error = vae.decode(z_noisy).sample - pixels[order]
        loss = (weight[order] * (error.square() + 0.1 * error.abs())).mean()
        loss = loss + 1e-4 * z.square().mean()
        return loss, {"loss": loss.item(), "mse": error.square().mean().item(), "latent rms": rms.item()}

    measured = partial(held_out, partial(round_trip, vae))
    fit("vae", {"vae": vae}, loss_fn, steps=steps, lr=2e-3, work=work, evaluate=measured)
    vae.register_to_config(scaling_factor=_scaling_factor(vae))
    return vae


@torch.no_grad()
def _scaling_factor(vae: AutoencoderDC) -> float:
    """1 / standard deviation of the latents at the high resolution, over training scenes."""
    rng = random.Random("vae-scale")
    pixels = to_pixels([render(random_scene(rng), HIGH_PX) for _ in range(512)])
    latents = torch.cat([vae.encode(p).latent for p in pixels.split(64)])
    return round(1 / latents.std().item(), 5)
