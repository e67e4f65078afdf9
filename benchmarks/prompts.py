"""How often the prompts that we show come out right: `python -m benchmarks.prompts runs/demo/export`.

The prompts are those of `sampling.prompts` in configs/shapes/curriculum.yaml, which README, snippets and sample grids
quote. Each is drawn with 40 seeds, and the exact scorer reads every image.
"""

from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

from wemmu.config import load_curriculum
from wemmu.config.schema import SamplePrompt
from wemmu.images import decode
from wemmu.pipeline import WeMMUPipeline
from wemmu.shapes.verdict import verdict

CURRICULUM = Path("configs/shapes/curriculum.yaml")


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
        ValueError: if the request has no exact answer.
    """
    verdicts = [verdict(image, text, inputs) for image in drawn]
    if unscored := [one.words for one in verdicts if one.right is None]:
        raise ValueError(unscored[0])
    return sum(bool(one.right) for one in verdicts)


if __name__ == "__main__":
    typer.run(main)
