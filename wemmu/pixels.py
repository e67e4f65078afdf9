"""Images in any form -> pixel tensors, and back.

`wemmu.images` decodes users' images. torchvision decodes the images of data sets, which `wemmu.images` has written, in
a third less time.
"""

from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from wemmu.images import decode, fit, to_rgb
from wemmu.types import Sizes

IMAGE_TYPES = "PIL image, path, bytes, BytesIO, numpy array, torch tensor"


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Convert RGB images of one size to float32 [B, 3, H, W] in [-1, 1]."""
    stacked = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_unit(image: Image.Image) -> Tensor:
    """Convert an image to float32 RGB [3, H, W] in [0, 1]."""
    return (to_pixels([image])[0] + 1) / 2


def as_image(value: Any) -> Image.Image:
    """Return an input image in any form of diffusers (PIL, path, bytes, array [H, W, C], tensor [C, H, W]).

    Arrays and tensors are uint8, or floats in [0, 1].

    Raises:
        ValueError: if it is none of these, or a file that holds no image.
    """
    if isinstance(value, Image.Image | str | Path | bytes | BytesIO):
        return _read(value)
    if isinstance(value, Tensor):
        value = value.detach().cpu().movedim(0, -1)
        value = (value.float() if value.is_floating_point() else value).numpy()
    if not isinstance(value, np.ndarray):
        raise ValueError(f"an image cannot be of type {type(value).__name__}; valid: {IMAGE_TYPES}")
    if value.ndim != 3 or value.shape[-1] not in (1, 3, 4):
        raise ValueError(f"an image of shape {value.shape} is not [H, W, C] (tensors: [C, H, W]) of 1, 3 or 4 channels")
    if value.size == 0:
        raise ValueError(f"an image of shape {value.shape} is empty")
    if np.issubdtype(value.dtype, np.floating):
        if not (value.min() >= 0 and value.max() <= 1):
            raise ValueError(f"an image of floats holds {value.min():g} to {value.max():g}; valid: 0 to 1")
        value = (value * 255).round().astype(np.uint8)
    elif value.dtype != np.uint8:
        raise ValueError(f"an image of {value.dtype}; valid: uint8, or floats from 0 to 1")
    return Image.fromarray(value[..., 0] if value.shape[-1] == 1 else value)


def _read(value: Image.Image | str | Path | bytes | BytesIO) -> Image.Image:
    name = "a PIL image"
    try:
        if isinstance(value, str | Path):
            name = str(Path(value).expanduser())
            value = Path(name).read_bytes()
        elif not isinstance(value, Image.Image):
            value = value if isinstance(value, bytes) else value.getvalue()
            name = f"{len(value)} bytes"
        if isinstance(value, bytes):
            return decode(value)
        value.load()
    # Anything at all: on damaged files Pillow's readers raise OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise ValueError(f"{name} cannot be read as an image: {error}") from error
    if 0 in value.size:
        raise ValueError(f"an image of {value.width} x {value.height} px is empty")
    return value


def fitted(image: Any, size: tuple[int, int]) -> Tensor:
    """Scale and crop an input image in any form (see `as_image`) to cover `size` px, as in training.

    Returns uint8 [3, height, width]; raises ValueError as `as_image`. size: (height, width).
    """
    return torch.from_numpy(np.array(fit(to_rgb(as_image(image)), *size))).permute(2, 0, 1)


def on_canvas(samples: Sequence[Sequence[Tensor]], size: tuple[int, int]) -> tuple[Tensor, Sizes | None]:
    """Place uint8 images [3, h, w], N per sample, at the top left of zeros [B, N, 3, H, W]; also return their sizes.

    The sizes are None if all are equal. size: (H, W) where there are no images.
    """
    sizes = tuple(tuple((image.shape[1], image.shape[2]) for image in images) for images in samples)
    every = {one for row in sizes for one in row} or {size}
    height, width = (max(side) for side in zip(*every, strict=True))
    canvas = torch.zeros(len(samples), len(samples[0]), height, width, 3, dtype=torch.uint8).movedim(-1, 2)
    for row, images in zip(canvas, samples, strict=True):
        for place, image in zip(row, images, strict=True):
            place[:, : image.shape[1], : image.shape[2]] = image
    return canvas, sizes if len(every) > 1 else None


def by_size(images: Tensor, sizes: Sizes | None) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the images of `on_canvas` without their canvas, those of one size together: [K, 3, h, w] and b * N + n."""
    flat, every = images.flatten(0, 1), [one for row in sizes or () for one in row]
    for size in dict.fromkeys(every):
        places = [i for i, one in enumerate(every) if one == size]
        yield places, flat[places, :, : size[0], : size[1]]
    if sizes is None and len(flat):
        yield list(range(len(flat))), flat


def cropped_to(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop images [K, 3, H, W] to the aspect ratio of `size`, by as many px on both sides."""
    height, width = images.shape[-2:]
    scale = min(height / size[0], width / size[1])
    top, left = (int((side - scale * new + 1e-6) // 2) for side, new in zip((height, width), size, strict=True))
    return images[..., top : height - top, left : width - left]


def stored_pixels(file: bytes | bytearray | memoryview) -> Tensor:
    """Decode an image file of a data set (JPEG or PNG) to uint8 [3, H, W].

    Raises:
        ValueError: if it cannot be decoded, or has another number of bits.
    """
    # torch warns of memory that cannot be written to, though nothing writes to it.
    file = file if isinstance(file, memoryview) and not file.readonly else bytearray(file)
    try:
        pixels = decode_image(torch.frombuffer(file, dtype=torch.uint8), ImageReadMode.RGB)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"an image cannot be decoded: {error}") from error
    if pixels.dtype != torch.uint8:
        raise ValueError(f"an image is of {pixels.dtype}")
    return pixels


def to_images(pixels: Tensor) -> list[Image.Image]:
    """Convert [B, 3, H, W] in [-1, 1] to RGB images; values outside are clipped."""
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(a) for a in array]
