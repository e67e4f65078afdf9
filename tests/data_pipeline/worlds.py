"""Small collections of real photographs and drawings, and their data sets, written in this process."""

import io
import json
from functools import cache
from pathlib import Path
from typing import Any

import skimage.data
from PIL import Image
from rich.console import Console

from data_pipeline.write import write
from wemmu.config import Curriculum
from wemmu.config.prepare import Prepare
from wemmu.config.shards import DataSet

SHAPES = {"kind": "shapes", "samples": {"t2i": 30, "edit": 13, "multi_edit": 7}, "seed": 5}
PHOTOGRAPHS = {"astronaut": "an astronaut in an orange suit", "coffee": "a cup of coffee", "chelsea": "a tabby cat"}


@cache
def photograph(name: str) -> Image.Image:
    """skimage's astronaut (512 x 512, height x width), coffee (400 x 600) or chelsea (300 x 451)."""
    return Image.fromarray(getattr(skimage.data, name)())


def collection(directory: Path, copies: int = 4, broken: bool = True) -> list[dict[str, Any]]:
    """Sources over photographs in `directory`: `photos` with captions, `edits` that turn a photograph to grey.

    Of each photograph there are `copies` crops, alternately wide and tall. With `broken` two records of `photos` are
    damaged, and one is too small for anything.
    """
    directory.mkdir(parents=True, exist_ok=True)
    captions, edits = [], []
    for name, caption in PHOTOGRAPHS.items():
        for number in range(copies):
            image, grey = f"{name}{number}.jpg", f"{name}{number}-grey.png"
            _crop(photograph(name), number).save(directory / image, quality=95)
            _crop(photograph(name), number).convert("L").save(directory / grey)
            captions.append({"image": image, "caption": f"{caption}, number {number}"})
            edits.append({"instruction": "make it black and white", "input": image, "target": grey})
    whole = (directory / "coffee0.jpg").read_bytes()
    (directory / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    photograph("coffee").resize((30, 20)).save(directory / "small.png")
    if broken:
        captions += [{"image": name, "caption": "?"} for name in ("cut.jpg", "gone.jpg", "small.png")]
    for file, lines in ("photos.jsonl", captions), ("edits.jsonl", edits):
        (directory / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [
        {"kind": "folder", "name": "photos", "path": str(directory / "photos.jsonl"), "root": str(directory)},
        {"kind": "edits", "name": "edits", "path": str(directory / "edits.jsonl"), "root": str(directory)},
    ]


def _crop(image: Image.Image, number: int) -> Image.Image:
    """Every number another part of the image, even ones wide and odd ones tall."""
    side = min(image.size) - 4 * number
    wide, high = (side, side * 3 // 4) if number % 2 == 0 else (side * 3 // 4, side)
    return image.crop((2 * number, 2 * number, 2 * number + wide, 2 * number + high))


def curriculum_of(shards: Path, sources: list[dict[str, Any]] | None = None, **changes: Any) -> Curriculum:
    """One stage at 32 px and one at 64 px over `shards`; `changes` are fields of `data.prepare` or of both stages.

    Without `sources` it is the miniature world. Partitions are small, so that every data set has several.
    """
    prepare = {
        "sources": sources or [SHAPES],
        "images": {"unit": 16, "max_aspect": 2.0},
        "partition": 7,
        "max_damaged": 0.5,
    }
    stage = {
        "steps": 60,
        "global_batch": 4,
        "trains": ["pathway"],
        "optimizer": {"lr": 1e-3},
        "mixture": {"t2i": 0.5, "reconstruction": 0.1, "edit": 0.4},
    }
    for field, value in changes.items():
        (prepare if field in Prepare.model_fields else stage)[field] = value
    return Curriculum.model_validate(
        {
            "name": "tiny",
            "backbones": {"vlm": "nowhere", "sana": "nowhere"},
            "data": {"shards": shards, "prepare": prepare},
            "memory": {"micro_batch": 2, "reference_resolution": 32},
            "stages": [{"name": "first", "resolution": 32, **stage}, {"name": "second", "resolution": 64, **stage}],
        }
    )


def write_in_process(curriculum: Curriculum) -> DataSet:
    """The data set of `curriculum`, with this process in the place of Ray's workers."""
    return write(curriculum, Console(file=io.StringIO()), workers=0)
