"""The fixed prompts of a stage, drawn on a contact sheet."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from wemmu.config.buckets import RequestSizes
from wemmu.config.schema import Sampling
from wemmu.images import fit, to_rgb
from wemmu.pixels import as_image, fitted, to_images
from wemmu.report.sheet import Row, contact_sheet
from wemmu.sampling.request import grouped
from wemmu.sampling.sampler import Sampler

# Levels of 255 by which the pixels of a blank image may differ.
BLANK = 2


def sample_grid(sampler: Sampler, sampling: Sampling, sizes: RequestSizes) -> tuple[Image.Image, int]:
    """Draw the fixed prompts of the config; returns one sheet, and how many images are blank."""
    texts = [prompt.text for prompt in sampling.prompts]
    images = [[to_rgb(as_image(path)) for path in prompt.images] for prompt in sampling.prompts]
    fits = [sizes.of([(image.height, image.width) for image in given]) for given in images]
    drawn: dict[int, Image.Image] = {}
    for members, request in grouped(texts, images, fits, torch.arange(len(texts))):
        drawn |= zip(members, to_images(sampler(request, sampling)), strict=True)
    rows = []
    for i, (text, given, (_, own)) in enumerate(zip(texts, images, fits, strict=True)):
        inputs = [fit(image, *size) for image, size in zip(given, own, strict=True)]
        rows.append(Row(text, [*inputs, drawn[i]]))
    return contact_sheet(rows), sum(map(is_blank, drawn.values()))


def is_blank(image: Image.Image) -> bool:
    """Return whether an image has only one colour, as from a model with NaN weights."""
    return int(np.ptp(np.asarray(image.convert("RGB")), axis=(0, 1)).max()) <= BLANK


def load_image(path: Path, resolution: int) -> torch.Tensor:
    """Load an image as training does, in a square of `resolution`: uint8 [3, H, W]."""
    return fitted(path, (resolution, resolution))
