"""Draw images from a run or an exported model: `wemmu sample RUN --prompt "..." --out image.png`."""

import itertools
import math
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, get_args

import typer
from PIL import Image

from wemmu.command_line import Ema, UsageError, plainly, program, start
from wemmu.config.schema import SolverName
from wemmu.source import SampleOptions, check_request, open_source, save_image

NEW = Path("sample.png")


@plainly()
def main(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="RUN (its newest finished stage), RUN/STAGE, or an exported model.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="IMAGE", help="Image to write, several side by side; default: a new sample.png here."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="Caption, edit instruction or question.")] = "",
    image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="Input image; repeat for more.")] = None,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="PX",
            help="Side in px, or HEIGHTxWIDTH; default: the resolution of training, in the first input's shape.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**62, help="Seed of the first image; image i uses seed + i.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Number of images.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps; default: the config's.")] = None,
    solver: Annotated[
        str | None, typer.Option(help=f"{' or '.join(get_args(SolverName))}; default: the config's.")
    ] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the text; default: the config's.")] = None,
    image_guidance: Annotated[
        float | None, typer.Option(help="Guidance scale of the image in an edit; default: the config's.")
    ] = None,
    ema: Ema = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; default: cuda if there is one.")] = None,
) -> None:
    """Generate images from a prompt, input images, or both.

    A run of ROSS or UAE answers a question about an image.
    """
    inputs = tuple(open_image(path) for path in image or ())
    if len(inputs) > 1 and not prompt:
        raise UsageError(f"{len(inputs)} --image were given without --prompt; say what to do with them")
    check_out(out or NEW)
    wish = SampleOptions(prompt, inputs, parse_size(size), seed, count, steps, guidance, image_guidance, solver)
    for name, weight in (("--guidance", guidance), ("--image-guidance", image_guidance)):
        if weight is not None and not math.isfinite(weight):
            raise UsageError(f"{name} {weight} is not a weight; valid: a finite number")
    check_request(source, wish, ema)
    opened = open_source(source, ema, device)
    responses = opened.respond(wish, None)
    made, settings = side_by_side([response.image for response in responses]), opened.settings(wish) | {"count": count}
    if out is None:
        with unused(NEW) as out:
            save_image(made, out, settings)
    else:
        out.parent.mkdir(parents=True, exist_ok=True)
        save_image(made, out, settings)
    print(*[response.words for response in responses if response.words], out, sep="\n")


@contextmanager
def unused(first: Path) -> Iterator[Path]:
    """Yield a new file: `first` or, if that exists, the same name with the next free number. An error removes it."""
    path, numbers = first, itertools.count(2)
    while True:
        try:
            # At once, for another process may look for a name, too.
            path.touch(exist_ok=False)
            break
        except FileExistsError:
            path = first.with_stem(f"{first.stem}-{next(numbers)}")
    try:
        yield path
    except BaseException:
        path.unlink()
        raise


def check_out(out: Path) -> None:
    """Raise UsageError if no image can be written under this name."""
    Image.init()
    written = sorted(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE)
    if out.suffix.lower() not in written:
        raise UsageError(f"--out {out} has no image format that can be written; valid choices: .png, .jpg, .webp")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the name of an image in it")
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UsageError(f"--out {out} cannot be written: {there} is not a writable folder")


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Parse `64` -> (64, 64), `64x96` -> (64, 96): height, then width, in px.

    Raises:
        UsageError: for any other text.
    """
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if found is None:
        raise UsageError(f"--size {text} is not a size; valid choices: a side as 64, or height x width as 64x96")
    return int(found[1]), int(found[2] or found[1])


def open_image(path: Path) -> Image.Image:
    """Raise UsageError if `path` is not an image."""
    from wemmu.images import decode

    try:
        return decode(path.read_bytes())
    # Anything at all: on damaged files Pillow's readers raise OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise UsageError(f"--image {path} cannot be read as an image: {error}") from error


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Join images of one size in a row, without changing a pixel."""
    import numpy as np

    return Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1))


if __name__ == "__main__":
    start(program(main))
