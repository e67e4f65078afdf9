"""The registration that tells by how much edits and reconstructions shift an image."""

import math
import random
from pathlib import Path

import pytest
import skimage.data
import torch
from diffusers import AutoencoderDC
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur, pil_to_tensor

from tools.pretraining.vae import MIXED_SIZES, shift
from wemmu.evaluation.fidelity.measures import pixel_shift, unasked
from wemmu.shapes.render import render
from wemmu.shapes.scene import random_scene

PX, FINE = 56, 8
VAE = Path(__file__).parents[2] / "assets/shapes/vae-mixed"


def cut(image: Image.Image, rows: int, columns: int, size: tuple[int, int] = (PX, PX)) -> Tensor:
    """A piece of a large image, `FINE` times smaller, that begins so many of the large one's px further."""
    height, width = size
    box = (32 + columns, 32 + rows, 32 + columns + width * FINE, 32 + rows + height * FINE)
    return pil_to_tensor(image.crop(box).resize((width, height), Image.Resampling.BOX)).float() / 255


@pytest.mark.parametrize(
    "image",
    [Image.fromarray(skimage.data.astronaut()), render(random_scene(random.Random(2)), 512)],
    ids=["photo", "scene"],
)
@pytest.mark.parametrize("size", [(PX, PX), (40, 56), (56, 32)], ids=str)
@pytest.mark.parametrize("by", [(0, 0), (2, -2), (4, 0), (0, 16), (24, -8)])
def test_a_shift_by_a_fraction_of_a_pixel_is_measured(image: Image.Image, by: tuple[int, int], size: tuple[int, int]):
    source, output = cut(image, 0, 0, size), cut(image, *by, size)
    true = math.hypot(*by) / FINE
    assert pixel_shift(source, output) == pytest.approx(true, abs=0.02)
    # What a model adds on top: blur and noise are no shift.
    noise = 0.03 * torch.randn(source.shape, generator=torch.Generator().manual_seed(0))
    assert pixel_shift(source, gaussian_blur(output, [5, 5], [1.0]) + noise) == pytest.approx(true, abs=0.05)


def test_what_an_edit_changes_is_left_out_and_a_flat_image_has_no_place():
    image = Image.fromarray(skimage.data.astronaut())
    source, output = cut(image, 0, 0), cut(image, 4, 0)
    target = source.clone()
    target[:, 16:40, 16:40] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    output[:, 16:40, 16:40] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    assert pixel_shift(source, output, unasked(source, target)) == pytest.approx(0.5, abs=0.1)
    flat = torch.full((3, PX, PX), 0.5)
    assert pixel_shift(flat, flat) is None
    assert pixel_shift(source, source, torch.zeros(PX, PX, dtype=torch.bool)) is None


@pytest.mark.parametrize("size", [*MIXED_SIZES, (64, 80)], ids=str)
def test_the_autoencoder_for_mixed_sizes_moves_none_of_them_by_half_a_pixel(size: tuple[int, int]):
    """The one for squares moves the others by more than half a pixel (docs/data.md)."""
    assert shift(AutoencoderDC.from_pretrained(VAE, torch_dtype=torch.float32), size, count=16) < 0.5
