"""Fine-tuning in the miniature: edits of a kind that no stage trained, and how many of them a model gets right.

    python -m benchmarks.finetune write            # my-edits/ and my-images/, as docs/finetune.md takes them
    python -m benchmarks.finetune score EXPORT     # correct of 100 held-out edits of that kind

The kind is "paint the shapes COLOUR": every object gets the colour. Its words are known, its meaning is not.
"""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from wemmu.command_line import program, start
from wemmu.shapes.edits import Edit
from wemmu.shapes.language import caption
from wemmu.shapes.render import render
from wemmu.shapes.scene import COLORS, Scene, Split, random_scene

PX = 64


def painted(rng: random.Random, split: Split) -> Edit:
    """Every object of a scene of `split` in one colour, which at least one of them does not have yet."""
    while True:
        scene, color = random_scene(rng, split), rng.choice(tuple(COLORS))
        target = replace(scene, objects=tuple(replace(one, color=color) for one in scene.objects))
        if target != scene and target.split != "composition":
            return Edit("paint", (scene,), f"paint the shapes {color}", target)


def write(
    folder: Annotated[Path, typer.Argument(help="Folder of my-edits and my-images.")] = Path(),
    edits: Annotated[int, typer.Option(help="Edit records.")] = 200,
    images: Annotated[int, typer.Option(help="Captioned images of what the model can draw already.")] = 1000,
) -> None:
    """Write edit records and captioned images, each with its list.jsonl."""
    rng = random.Random("own records")
    rows = []
    for number in range(edits):
        edit = painted(rng, "train")
        row = {
            "instruction": edit.instruction,
            "input": f"{number:04d}_before.png",
            "target": f"{number:04d}_after.png",
        }
        _save(folder / "my-edits", {row["input"]: edit.sources[0], row["target"]: edit.target})
        rows.append(row)
    _list(folder / "my-edits", rows)
    rows = []
    for number in range(images):
        scene = random_scene(rng, "train")
        _save(folder / "my-images", {f"{number:04d}.png": scene})
        rows.append({"image": f"{number:04d}.png", "caption": caption(scene, rng)})
    _list(folder / "my-images", rows)


def score(
    export: Annotated[Path, typer.Argument(help="An exported pipeline.")],
    count: Annotated[int, typer.Option(help="Held-out edits.")] = 100,
) -> None:
    """Print how many held-out edits come out right, and how many come out as their input."""
    from wemmu.pipeline import WeMMUPipeline
    from wemmu.shapes.scorer import score_edit

    rng = random.Random("held out")
    edits = [painted(rng, "test") for _ in range(count)]
    pipe = WeMMUPipeline.from_pretrained(str(export))
    pipe.set_progress_bar_config(disable=True)
    asked, given = [edit.instruction for edit in edits], [render(edit.sources[0], PX) for edit in edits]
    scores = [score_edit(*pair) for pair in zip(pipe(asked, image=given, seed=0).images, edits, strict=True)]
    right, copied = sum(one.correct for one in scores), sum(one.copied for one in scores)
    print(f"paint the shapes: {right} of {count} correct, {copied} copied")


def _save(folder: Path, scenes: dict[str, Scene]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in scenes.items():
        render(scene, PX).save(folder / name)


def _list(folder: Path, rows: list[dict[str, str]]) -> None:
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    start(program(write, score))
