"""The arguments of a call of the pipeline: checked, and in the forms that the sampler takes."""

import math
from collections.abc import Iterator, Sequence
from io import BytesIO
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from wemmu.config.base import LARGEST_GUIDANCE, MOST_SOLVER_STEPS
from wemmu.config.buckets import RequestSizes
from wemmu.config.exported import ARGUMENTS
from wemmu.config.schema import Sampling
from wemmu.images import to_rgb
from wemmu.pixels import as_image, to_images
from wemmu.readable import valid
from wemmu.sampling.solvers import SOLVERS
from wemmu.shapes.vocabulary import WORLD, unknown

# No warning if a side differs from a trained one by at most this share.
_NEAR = 0.15
OUTPUT_TYPES = ("pil", "pt", "np", "latent")
# One input image: see `wemmu.pixels.as_image`.
ImageLike = Image.Image | str | Path | bytes | BytesIO | np.ndarray[Any, Any] | Tensor
Images = ImageLike | Sequence[ImageLike] | None


def requests(
    prompt: str | Sequence[str] | None,
    image: Images | Sequence[Images],
    negative: str | Sequence[str] | None,
) -> tuple[list[str], list[list[Image.Image]], list[str]]:
    """Return the texts and, for each text, its list of images and its negative text."""
    alone = prompt is None or isinstance(prompt, str)
    if not alone and not isinstance(prompt, Sequence):
        raise ValueError(f"prompt is of type {type(prompt).__name__}; valid: a text, or a list of texts")
    texts = [prompt or ""] if isinstance(prompt, str | None) else list(prompt)
    if not texts:
        raise ValueError("prompt is an empty list; give one text for each image to make")
    if wrong := [i for i, text in enumerate(texts) if not isinstance(text, str)]:
        raise ValueError(f"prompt[{wrong[0]}] is of type {type(texts[wrong[0]]).__name__}; valid: a text")
    if alone or image is None:
        entries: list[Any] = [image] * len(texts)
    elif not isinstance(image, list | tuple) or len(image) != len(texts):
        got = f"a list of {len(image)}" if isinstance(image, list | tuple) else f"one {type(image).__name__}"
        raise ValueError(
            f"a list of {len(texts)} prompts needs a list of {len(texts)} entries as image, each an image, a list of "
            f"images or None; got {got}"
        )
    else:
        entries = list(image)
    given = [[] if e is None else list(e) if isinstance(e, list | tuple) else [e] for e in entries]
    negatives: Any = [negative or ""] * len(texts) if isinstance(negative, str | None) else negative
    listed = isinstance(negatives, list | tuple) and all(isinstance(text, str) for text in negatives)
    if not listed or len(negatives) != len(texts):
        raise ValueError(
            f"negative_prompt is {negative!r}; valid: a text, or a list of {len(texts)}, one for each prompt"
        )
    if broken := [text for text in (*texts, *negatives) if text != text.encode(errors="ignore").decode()]:
        raise ValueError(f"prompt {broken[0]!r} holds half a character (a surrogate), which no text has")
    return texts, [[_opened(one) for one in images] for images in given], list(negatives)


def repeated(times: int, *lists: list[Any]) -> Iterator[list[Any]]:
    """Yield each list with every entry repeated `times` times in a row."""
    if not (_whole(times) and times > 0):
        raise ValueError(f"num_images_per_prompt is {times!r}; valid: a whole number from 1")
    return ([entry for entry in entries for _ in range(times)] for entries in lists)


def _opened(value: Any) -> Image.Image:
    try:
        return to_rgb(as_image(value))
    except ValueError as error:
        raise ValueError(f"image: {error}") from error


def seeds(
    seed: int | Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None, number: int
) -> Tensor:
    """Return the seed of each image, int64 [number]."""
    if seed is not None and generator is not None:
        raise ValueError("give either seed or generator, not both")
    if isinstance(seed, int | np.integer) and _whole(seed):
        seed = [int(seed) + i for i in range(number)]
    several: Any = seed if seed is not None else generator
    listed = isinstance(seed, Sequence) or (isinstance(seed, np.ndarray) and seed.ndim == 1)
    if seed is not None and not (listed and all(_whole(s) and -(2**63) <= s < 2**63 for s in several)):
        raise ValueError(
            f"seed is {seed!r}; valid: a whole number, or a list with one for each prompt, of 64 bits at most"
        )
    if isinstance(several, Sequence | np.ndarray) and len(several) != number:
        raise ValueError(f"{number} prompts need {number} seeds or generators, got {len(several)}")
    if seed is not None:
        return torch.tensor([int(s) for s in several])
    sources = generator if isinstance(generator, Sequence) else [generator] * number
    if wrong := [g for g in sources if g is not None and not isinstance(g, torch.Generator)]:
        raise ValueError(f"generator is of type {type(wrong[0]).__name__}; valid: torch.Generator, or a list of them")
    drawn = [torch.randint(2**62, (1,), generator=g, device=g.device if g else "cpu") for g in sources]
    return torch.cat([d.cpu() for d in drawn])


def first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def output(images: Sequence[Tensor], output_type: str) -> list[Image.Image] | Tensor | np.ndarray[Any, Any]:
    """Convert pixels [3, H, W] in [-1, 1] to `output_type`; latents stay as they are."""
    if output_type == "pil":
        return [to_images(image[None])[0] for image in images]
    if len(shapes := {tuple(image.shape) for image in images}) > 1:
        raise ValueError(
            f"the images have different sizes, {sorted(shapes)}, which output_type={output_type!r} cannot hold; give "
            'height and width, or output_type="pil"'
        )
    pixels = torch.stack(list(images))
    if output_type == "latent":
        return pixels
    unit = (pixels.float() / 2 + 0.5).clamp(0, 1)
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()


def sampling_of(defaults: dict[str, Any], given: dict[str, Any]) -> Sampling:
    """Return the settings of a call: the defaults, and what is given and not None, under the names of `Sampling`."""
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if name == "solver":
            if value not in SOLVERS:
                raise ValueError(f"solver is {value!r}; {valid(value, SOLVERS, 'valid choices')}")
            continue
        number, most = isinstance(value, Real) and not isinstance(value, bool), LARGEST_GUIDANCE
        if name == "steps":
            if not (_whole(value) and 0 < value <= MOST_SOLVER_STEPS):
                raise ValueError(
                    f"num_inference_steps is {value!r}; valid: a whole number from 1 to {MOST_SOLVER_STEPS}"
                )
        elif not (number and -most <= value <= most):
            raise ValueError(f"{ARGUMENTS[name]} is {value!r}; valid: a number from {-most} to {most}")
    return Sampling(**defaults | given)


def check_size(size: tuple[Any, Any], rules: RequestSizes) -> None:
    """Raise ValueError unless images of `size` = (height, width) px can be drawn."""
    for name, side in zip(("height", "width"), size, strict=True):
        if not _whole(side) or side <= 0:
            raise ValueError(f"{name} is {side!r}; valid: a whole number of px")
    if problem := rules.problem(size):
        raise ValueError(problem)


def beyond(world: str | None, resolutions: Sequence[int], texts: Sequence[str], size: tuple[int, int]) -> Iterator[str]:
    """Return a warning for each property of a request that training did not cover.

    world: "shapes" if all training used the miniature. resolutions: px of the stages. size: (height, width) px; sizes
    with the area of one of these squares are known, like aspect-ratio buckets.
    """
    if world == WORLD and (words := list(dict.fromkeys(word for text in texts for word in unknown(text)))):
        yield f"the model knows only the shapes world and has never read: {', '.join(words)}"
    side = math.sqrt(size[0] * size[1])
    if resolutions and not any(abs(side / known - 1) < _NEAR for known in resolutions):
        known = ", ".join(f"{px} px" for px in resolutions)
        yield f"the model was trained at {known}; {size[0]} x {size[1]} px is beyond that"
