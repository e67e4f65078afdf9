"""Draw images from a run or an exported model: `wemmu sample RUN --prompt "..." --out image.png`."""

import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image

from wemmu.command_line import Ema, UsageError, plainly, program, start, without_scipy
from wemmu.config import ConfigError, StageRun, Task, load_stage, load_stages
from wemmu.config.checkpoints import CHECKPOINTS, no_checkpoint, stage_folder

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class SampleOptions:
    """What to generate: `count` images of `size` = (height, width) px, None for the model's default.

    Image i uses seed + i. steps, guidance, image_guidance: None for the model's default.
    """

    prompt: str
    images: tuple[Image.Image, ...]
    size: tuple[int, int] | None
    seed: int
    count: int
    steps: int | None
    guidance: float | None
    image_guidance: float | None

    def weights(self, task: Task) -> dict[str, float]:
        """Return guidance weights under the names of `Sampling`; `guidance` weights the text, if the task has text."""
        name = {Task.EDIT: "instruction", Task.RECONSTRUCTION: "image", Task.MULTI_EDIT: "multi"}.get(task, "t2i")
        given = [("image", self.image_guidance), (name, self.guidance)]
        return {key: value for key, value in given if value is not None}


# Draws a wish from the source it was opened on.
Draw = Callable[[SampleOptions], list[Image.Image]]


@plainly()
def main(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="RUN (its newest finished stage), RUN/STAGE, or an exported model.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="IMAGE", help="Image to write, several side by side; else a new sample.png here."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What to generate, or what to do with the images.")] = "",
    image: Annotated[list[Path] | None, typer.Option(metavar="FILE", help="An input image; repeat for more.")] = None,
    size: Annotated[str | None, typer.Option(metavar="PX", help="Side, or HEIGHTxWIDTH; else as trained.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Image i uses seed + i.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="Images to draw.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Solver steps; default: the config's.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the text; default: the config's.")] = None,
    image_guidance: Annotated[float | None, typer.Option(help="Guidance scale of the image, in an edit.")] = None,
    ema: Ema = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N; else cuda where there is one.")] = None,
) -> None:
    """Generate images for a prompt, input images, or both."""
    inputs = tuple(open_image(path) for path in image or ())
    if len(inputs) > 1 and not prompt:
        raise UsageError(f"{len(inputs)} --image were given without --prompt; say what to do with them")
    out = out or unused("sample.png")
    check_out(out)
    wish = SampleOptions(prompt, inputs, parse_size(size), seed, count, steps, guidance, image_guidance)
    for name, weight in (("--guidance", guidance), ("--image-guidance", image_guidance)):
        if weight is not None and not math.isfinite(weight):
            raise UsageError(f"{name} {weight} is not a weight; valid: a finite number")
    drawn = open_source(source, ema, device)(wish)
    out.parent.mkdir(parents=True, exist_ok=True)
    side_by_side(drawn).save(out)
    print(out)


def unused(name: str) -> Path:
    """`name` in the working directory or, if that is there, with the next number that is not."""
    path = Path(name)
    numbers = itertools.count(2)
    while path.exists():
        path = Path(f"{Path(name).stem}-{next(numbers)}{path.suffix}")
    return path


def check_out(out: Path) -> None:
    """Raises UsageError if no image can be written under this name."""
    Image.init()
    written = sorted(suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.SAVE)
    if out.suffix.lower() not in written:
        raise UsageError(f"--out {out} names no kind of image that can be written; valid choices: .png, .jpg, .webp")
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give the name of an image in it")
    there = next(parent for parent in out.absolute().parents if parent.exists())
    if not (there.is_dir() and os.access(there, os.W_OK)):
        raise UsageError(f"--out {out} cannot be written: {there} is not a writable folder")


def parse_size(text: str | None) -> tuple[int, int] | None:
    """`64` -> (64, 64), `64x96` -> (64, 96): height, then width, in px.

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
    """Raises UsageError if `path` is not an image."""
    from wemmu.images import decode

    try:
        return decode(path.read_bytes())
    # Anything at all: on damaged files Pillow's readers raise OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        raise UsageError(f"--image {path} cannot be read as an image: {error}") from error


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one size in a row, pixel by pixel as they were drawn."""
    import numpy as np

    return Image.fromarray(np.concatenate([np.asarray(image) for image in images], axis=1))


def open_source(source: Path, ema: bool | None = None, device: str | None = None) -> Draw:
    """Load `source`. ema: whether to use the moving average of the weights; None: if the stage keeps one.

    device: None uses a GPU if there is one.

    Raises:
        ConfigError: if `source` is not a run, a stage or an export, or its config is invalid.
    """
    if (source / "model_index.json").is_file():
        if ema is not None:
            raise UsageError(f"{source} is an export, which has one set of weights; --ema is for RUN and RUN/STAGE")
        return _exported(source, device)
    stage = stage_folder(source)
    return _stage(load_stage(stage / "config.yaml"), stage, ema, device)


def _device(name: str | None) -> "torch.device":
    """Raises UsageError if there is no such device here."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _stage(run: StageRun, folder: Path, ema: bool | None, device: str | None) -> Draw:
    import torch

    from wemmu.checkpoint.retention import latest
    from wemmu.config.schema import Sampling
    from wemmu.pixels import fitted, to_images

    with without_scipy():
        from wemmu.pipeline import beyond, check_size
        from wemmu.recipes.wemmu.recipe import WeMMURecipe
        from wemmu.sampling.request import GenerationRequest, task_of
        from wemmu.training.build import load_trained

    if not run.recipe.draws:
        raise ConfigError(
            f"{folder} is of a VLM that answers and generates no images; `wemmu export {folder} --out DIR` "
            "writes a directory that transformers loads"
        )
    if (checkpoint := latest(folder / CHECKPOINTS)) is None:
        raise no_checkpoint(folder)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    made = load_trained(run, checkpoint, ema, _device(device))
    assert isinstance(made, WeMMURecipe), "the recipe that draws"
    model = made.model

    resolutions = sorted({stage.stage.resolution for _, stage in load_stages(folder.resolve().parent)})

    def draw(wish: SampleOptions) -> list[Image.Image]:
        size = wish.size or (run.stage.resolution, run.stage.resolution)
        check_size(size, model.bridge.position_mlp.table.shape[0], model.vlm.token_px, model.vae.latent_px)
        for line in beyond(run.world, resolutions, [wish.prompt], size):
            print(line, file=sys.stderr)
        task = task_of(wish.prompt, len(wish.images))
        # The images' seeds key the noise, as in the exported pipeline.
        changes = {"seed": 0, **({"steps": wish.steps} if wish.steps else {}), **wish.weights(task)}
        sampling = Sampling(**run.sampling.model_dump() | changes)
        images = fitted(wish.images, size)
        images = images.expand(wish.count, *images.shape)
        seeds = torch.arange(wish.seed, wish.seed + wish.count)
        return to_images(
            made.sampler(GenerationRequest(task, [wish.prompt] * wish.count, images, size, seeds), sampling)
        )

    return draw


def _exported(directory: Path, device: str | None) -> Draw:
    with without_scipy():
        from wemmu.pipeline import WeMMUPipeline
        from wemmu.sampling.request import task_of

    pipe = WeMMUPipeline.from_pretrained(directory).to(_device(device))

    def draw(wish: SampleOptions) -> list[Image.Image]:
        task = task_of(wish.prompt, len(wish.images))
        height, width = wish.size or (None, None)
        return pipe(
            [wish.prompt] * wish.count,
            image=[list(wish.images)] * wish.count,
            height=height,
            width=width,
            num_inference_steps=wish.steps,
            seed=wish.seed,
            **{f"{name}_guidance_scale": value for name, value in wish.weights(task).items()},
        ).images

    return draw


if __name__ == "__main__":
    start(program(main))
