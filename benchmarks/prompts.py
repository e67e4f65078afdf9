"""How often the prompts that we show come out right: `python -m benchmarks.prompts runs/demo/export`.

The prompts are those of `sampling.prompts` in configs/shapes/curriculum.yaml, which README, snippets and sample grids
quote. Each is drawn with 40 seeds, and the exact scorer reads every image.
"""

import random
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from wemmu.config import load_curriculum
from wemmu.config.schema import SamplePrompt
from wemmu.images import decode
from wemmu.pipeline import WeMMUPipeline
from wemmu.shapes.edits import EDITS, edits_with_object
from wemmu.shapes.scene import Scene
from wemmu.shapes.scorer import caption_satisfied, read, same_scene

CURRICULUM = Path("configs/shapes/curriculum.yaml")
# Random edits of a scene among which we look for the instruction; a scene has a few hundred.
DRAWS = 20_000


def main(
    export: Annotated[Path, typer.Argument(help="An exported pipeline, as `make demo` leaves it.")],
    seeds: Annotated[int, typer.Option(min=1, help="Images for each prompt.")] = 40,
    prompts: Annotated[list[str] | None, typer.Option("--prompt", help="Captions to try instead; repeatable.")] = None,
) -> None:
    """Count the right images for each prompt that we show."""
    pipe = WeMMUPipeline.from_pretrained(export)
    pipe.set_progress_bar_config(disable=True)
    shown = [SamplePrompt(text=text) for text in prompts or ()] or load_curriculum(CURRICULUM).sampling.prompts
    for prompt in shown:
        inputs = [decode(path.read_bytes()) for path in prompt.images]
        drawn = pipe([prompt.text] * seeds, image=[inputs] * seeds, seed=0).images
        print(f"{right(prompt.text, inputs, drawn):3} of {seeds}  {prompt.text or 'reconstruction'}", flush=True)


def right(text: str, inputs: list[Image.Image], drawn: list[Image.Image]) -> int:
    """Number of drawn images that are what `text` asks for, given the input images.

    Raises:
        ValueError: if an input image is no scene of the world, or if no edit has the words of `text`.
    """
    if not inputs:
        return sum(caption_satisfied(image, text) for image in drawn)
    scenes = [scene for image in inputs if (scene := read(image).scene)]
    if len(scenes) < len(inputs):
        raise ValueError("an input image is no scene of the world, so no right answer is known")
    target = asked_for(text, scenes) if text else scenes[0]
    return sum(same_scene(image, target) for image in drawn)


def asked_for(instruction: str, scenes: list[Scene]) -> Scene:
    """The scene that `instruction` makes of one scene, or of the first of two.

    Raises:
        ValueError: if no edit of the world has these words.
    """
    if len(scenes) == 2:
        found = (edit.target for edit in edits_with_object(*scenes) if edit.instruction == instruction)
    else:
        draws = (make(scenes[0], random.Random(seed)) for seed in range(DRAWS) for make in EDITS.values())
        found = (made[1] for made in draws if made and made[0] == instruction)
    if (target := next(found, None)) is None:
        raise ValueError(f"{instruction!r} is no edit of these images in the shapes world")
    return target


if __name__ == "__main__":
    typer.run(main)
