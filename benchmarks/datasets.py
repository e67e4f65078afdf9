"""What the benchmarks work on: photographs in WebDataset tars, and data sets that are written from them."""

import io
import random
import tarfile
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import skimage.data
from PIL import Image
from rich.console import Console

from data_pipeline.write import write
from wemmu.config import Curriculum
from wemmu.config.shards import DataSet
from wemmu.mds import read_index

CAPTIONS = {
    "astronaut": "a portrait of an astronaut in an orange suit in front of a flag and a model of the space shuttle",
    "coffee": "a cup of espresso on a wooden table, seen from above, with a spoon on the saucer",
    "chelsea": "a close-up of a tabby cat that looks past the camera with its ears up",
    "rocket": "a rocket on its launch pad between lattice towers in front of a pale evening sky",
    "hubble_deep_field": "many far galaxies of different shapes and colours on a black sky",
}


@cache
def _photographs() -> dict[str, Image.Image]:
    return {name: Image.fromarray(getattr(skimage.data, name)()) for name in CAPTIONS}


def photograph(number: int, sides: tuple[int, int]) -> tuple[bytes, str]:
    """A JPEG file and its caption: a piece of a photograph, its longer side within `sides` px; always the same."""
    rng = random.Random(number)
    name = rng.choice(list(CAPTIONS))
    whole = _photographs()[name]
    # At least 0.6 of each side of the photograph, in the shape that comes out.
    wide, high = (round(side * rng.uniform(0.6, 1)) for side in whole.size)
    x, y = rng.randint(0, whole.width - wide), rng.randint(0, whole.height - high)
    scale = rng.randint(*sides) / max(wide, high)
    size = round(wide * scale), round(high * scale)
    piece = whole.crop((x, y, x + wide, y + high)).resize(size, Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    piece.save(buffer, "JPEG", quality=90)
    return buffer.getvalue(), f"{CAPTIONS[name]}, number {number}"


def distinct(count: int, sides: tuple[int, int], drawn: int) -> Iterator[tuple[bytes, str]]:
    """`count` photographs of `drawn` ones; a few bytes behind the end of the JPEG make every file another."""
    files = [photograph(number, sides) for number in range(min(count, drawn))]
    for number in range(count):
        data, caption = files[number % drawn]
        yield data + number.to_bytes(8), f"{caption}, {number}"


def write_tars(directory: Path, records: Iterable[tuple[bytes, str]], each: int) -> None:
    """WebDataset tars of `each` records."""
    directory.mkdir(parents=True)
    records = iter(records)
    while group := list(islice(records, each)):
        path = directory / f"{len(list(directory.iterdir())):05d}.tar"
        with tarfile.open(path, "w", encoding="utf-8") as tar:
            for number, (image, caption) in enumerate(group):
                for kind, data in ("jpg", image), ("txt", caption.encode()):
                    member = tarfile.TarInfo(f"{number:09d}.{kind}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


def curriculum(
    tars: Path, shards: Path, resolutions: tuple[int, ...], batch: int, steps: int = 1, workers: int = 0, **images: Any
) -> Curriculum:
    """One text-to-image stage at each resolution, its batch not divided; `images` are fields of that config."""
    stage = {"global_batch": batch, "trains": ["pathway"], "optimizer": {"lr": 1e-3}, "mixture": {"t2i": 1.0}}
    source = {"kind": "webdataset", "name": "photographs", "path": f"{tars}/*.tar"}
    return Curriculum.model_validate(
        {
            "name": "benchmark",
            "backbones": {"vlm": "nowhere", "sana": "nowhere"},
            "data": {
                "shards": shards,
                "prepare": {"sources": [source], "images": images},
                "workers": workers,
            },
            "memory": {"micro_batch": batch, "reference_resolution": max(resolutions)},
            "stages": [{"name": f"at-{r}", "resolution": r, "steps": steps, **stage} for r in resolutions],
        }
    )


def write_dataset(curriculum: Curriculum) -> DataSet:
    """In this process."""
    return write(curriculum, Console(file=io.StringIO()), workers=0)


def stored(shards: Path, resolution: int) -> list[tuple[bytes, str]]:
    """The images, as files, and captions of the square stream at `resolution`."""
    index = read_index(shards / f"t2i/{resolution}/{resolution}x{resolution}")
    return [(bytes(row["target"]), str(row["prompt"], "utf-8")) for shard in index for row in shard.records()]
