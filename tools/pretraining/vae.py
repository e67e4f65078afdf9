"""AutoencoderDC on the shapes world: reconstruct renders, with the weight on the shapes' pixels.

Without the weight the background, most of every image, decides the loss and the corners blur until shapes are
confused. Noise on the latents during training makes the decoder forgive what a diffusion model gets slightly wrong.
"""

import random
from functools import partial
from pathlib import Path

import torch
from diffusers.models import AutoencoderDC
from torch import Tensor, nn

from tools.pretraining.loop import fit, held_out
from wemmu.evaluation.fidelity.measures import pixel_shift
from wemmu.pixels import to_images, to_pixels
from wemmu.shapes.backbones import HIGH_PX, LOW_PX, VAE_CONFIG
from wemmu.shapes.render import render
from wemmu.shapes.scene import BACKGROUNDS, Split, random_scene
from wemmu.shapes.scorer import same_scene

FOREGROUND_WEIGHT = 6.0
LATENT_NOISE = 0.15
# (height, width): the squares, and the other buckets at HIGH_PX up to an aspect ratio of 2.
MIXED_SIZES = ((48, 80), (64, 64), (80, 48), (LOW_PX, LOW_PX))


def _batch(step: int, size: int, mixed: bool = False) -> tuple[Tensor, Tensor]:
    """Pixels [B, 3, H, W] in [-1, 1] and the weight of each pixel [B, 1, H, W]."""
    rng = random.Random(f"vae-{step}")
    px: int | tuple[int, int] = LOW_PX if step % 3 == 0 else HIGH_PX
    if mixed:
        px = MIXED_SIZES[step // 2 % len(MIXED_SIZES)]
    scenes = [random_scene(rng) for _ in range(size)]
    pixels = to_pixels([render(s, px) for s in scenes])
    if mixed and step % 2:
        pixels = moved(pixels, rng.randint(-8, 8), rng.randint(-8, 8))
    empty = torch.stack([torch.tensor(BACKGROUNDS[s.background]) for s in scenes]).float() / 127.5 - 1
    foreground = ((pixels - empty[:, :, None, None]).abs().amax(1, keepdim=True) > 0.02).float()
    return pixels, 1 + (FOREGROUND_WEIGHT - 1) * foreground


def moved(pixels: Tensor, down: int, right: int) -> Tensor:
    """Move images [B, 3, H, W] by up to 8 px; the border, which is background, is repeated."""
    height, width = pixels.shape[-2:]
    padded = nn.functional.pad(pixels, (8, 8, 8, 8), mode="replicate")
    return padded[..., 8 - down : 8 - down + height, 8 - right : 8 - right + width]


@torch.no_grad()
def round_trip(vae: AutoencoderDC, split: Split, px: int, count: int = 256) -> float:
    """Share of renders whose scene is still read exactly after encode and decode."""
    rng = random.Random(f"vae-eval-{split}")
    scenes = [random_scene(rng, split) for _ in range(count)]
    pixels = to_pixels([render(s, px) for s in scenes])
    decoded = torch.cat([vae.decode(vae.encode(p).latent).sample for p in pixels.split(64)])
    return sum(same_scene(image, s) for image, s in zip(to_images(decoded), scenes, strict=True)) / count


@torch.no_grad()
def shift(vae: AutoencoderDC, size: tuple[int, int], down: int = 0, right: int = 0, count: int = 32) -> float:
    """Return by how many px, in the mean, encode and decode move held-out renders of `size`, drawn beside the grid."""
    rng = random.Random("vae-shift")
    pixels = moved(to_pixels([render(random_scene(rng, "test"), size) for _ in range(count)]), down, right)
    decoded = vae.decode(vae.encode(pixels).latent).sample.clamp(-1, 1)
    found = [pixel_shift(x / 2 + 0.5, y / 2 + 0.5) for x, y in zip(pixels, decoded, strict=True)]
    known = [value for value in found if value is not None]
    return sum(known) / len(known)


def train(work: Path, steps: int, batch_size: int = 48, start: Path | None = None) -> AutoencoderDC:
    """Train on squares or, from the autoencoder in `start`, its decoder on mixed sizes and shapes at any place.

    In squares every shape has its centre at 0 or 8 px of a latent's 16. Elsewhere the decoder has to learn where it is.
    The encoder stays, so that the DiT's latents of squares do.
    """
    torch.manual_seed(0)
    mixed = start is not None
    vae = AutoencoderDC.from_pretrained(start) if mixed else AutoencoderDC(**VAE_CONFIG)
    vae.encoder.requires_grad_(not mixed)
    print(f"vae: {sum(p.numel() for p in vae.parameters()) / 1e6:.2f} M parameters", flush=True)

    def loss_fn(step: int) -> tuple[Tensor, dict[str, float]]:
        pixels, weight = _batch(step, batch_size, mixed)
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
    name, lr = ("vae-mixed", 1e-3) if mixed else ("vae", 2e-3)
    fit(name, {"vae": vae}, loss_fn, steps=steps, lr=lr, work=work, evaluate=measured)
    if not mixed:
        vae.register_to_config(scaling_factor=_scaling_factor(vae))
    return vae


@torch.no_grad()
def _scaling_factor(vae: AutoencoderDC) -> float:
    """1 / standard deviation of the latents at the high resolution, over training scenes."""
    rng = random.Random("vae-scale")
    pixels = to_pixels([render(random_scene(rng), HIGH_PX) for _ in range(512)])
    latents = torch.cat([vae.encode(p).latent for p in pixels.split(64)])
    return round(1 / latents.std().item(), 5)
