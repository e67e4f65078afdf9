"""What a stranger does with an export, in a process of its own: `python -m tests.export.fresh DIRECTORY OUT`.

Loads the pipeline in both ways and draws every case with each, into a file of safetensors.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image


@dataclass(frozen=True)
class Case:
    """One request; size is (height, width) in px, images the numbers of its input images."""

    text: str
    size: tuple[int, int]
    images: tuple[int, ...] = ()
    seed: int = 7


CASES = {
    "text to image, 32 px": Case("a red circle above a blue square", (32, 32)),
    "text to image, 64 px": Case("a red circle above a blue square", (64, 64), seed=8),
    "text to image, 64 x 96 px": Case("a small green ring", (64, 96)),
    "nothing": Case("", (32, 32)),
    "edit": Case("make the circle green", (64, 64), (0,)),
    "edit, 96 x 32 px": Case("remove the square", (96, 32), (1,)),
    "reconstruction": Case("", (32, 32), (1,)),
    "two images": Case("put the circle of the first beside the square of the second", (64, 64), (0, 1)),
}
# The images have neither the size asked for nor its proportions, and one has an alpha channel.
MODES = {0: ("RGB", (50, 70, 3)), 1: ("RGBA", (33, 64, 4))}


def noise_image(number: int) -> Image.Image:
    """Input image `number`, of noise."""
    mode, shape = MODES[number]
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, np.uint8), mode)


def draw(pipe, case: Case) -> torch.Tensor:
    """[1, 3, H, W] in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    given = [noise_image(n) for n in case.images]
    # One image is given as itself, several as a list.
    image = None if not given else given[0] if len(given) == 1 else given
    height, width = case.size
    return pipe(case.text, image=image, height=height, width=width, seed=case.seed, output_type="pt").images


def main(directory: str, out: str) -> None:
    torch.set_num_threads(1)
    from diffusers import DiffusionPipeline
    from safetensors.torch import save_file

    stock = DiffusionPipeline.from_pretrained(directory, custom_pipeline=directory, trust_remote_code=True)

    from wemmu.pipeline import WeMMUPipeline

    own = WeMMUPipeline.from_pretrained(directory)
    ways = {"diffusers": stock, "wemmu": own}
    save_file({f"{way}/{name}": draw(pipe, case) for way, pipe in ways.items() for name, case in CASES.items()}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
