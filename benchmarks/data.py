"""How fast data are written and read, against the bare work and against other readers.

    OMP_NUM_THREADS=1 python -m benchmarks.data speed      # some 10 minutes
    OMP_NUM_THREADS=1 python -m benchmarks.data growth     # from 10^3 to 10^5 records, time and memory
    OMP_NUM_THREADS=1 python -m benchmarks.data feed       # 1024 px, part by part: what a GPU's loader costs

All sides of a comparison run in turns in this one process (readers with workers: in its children), several rounds.
"""

import io
import multiprocessing
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Any

import datasets
import torch
import typer
from PIL import Image

from benchmarks import readers
from benchmarks.datasets import curriculum, distinct, photograph, stored, write_dataset, write_tars
from benchmarks.measure import RESULTS, Out, Quick, Row, as_dicts, as_markdown, cost, in_turns, peak_mb, rows, save
from data_pipeline.partitions import write_partition
from data_pipeline.plan import Job, plan
from wemmu.backbones.patches import resize
from wemmu.config.buckets import buckets, nearest
from wemmu.config.shards import LEDGER
from wemmu.images import fit
from wemmu.pixels import stored_pixels
from wemmu.positions import token_grid
from wemmu.prompts import PromptEncoder
from wemmu.shapes.processor import save_processor

RESOLUTIONS = (256, 512)
BATCH = 16
FEED_PX = 1024


@dataclass(frozen=True)
class Sizes:
    """`sides` of the photographs in px; samples read in a round at each resolution; records of the growing sets."""

    photographs: int
    sides: tuple[int, int]
    rounds: int
    read: dict[int, int]
    records: tuple[int, ...]


FULL = Sizes(96, (640, 1024), 3, {256: 1536, 512: 576}, (1_000, 10_000, 100_000))
QUICK = Sizes(16, (520, 560), 1, {256: 16, 512: 16}, (32,))


class What(StrEnum):
    SPEED = "speed"
    GROWTH = "growth"
    FEED = "feed"


def main(what: What, quick: Quick = False, out: Out = RESULTS) -> None:
    torch.set_num_threads(1)
    # Readers with workers fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    sizes, table = QUICK if quick else FULL, []
    with tempfile.TemporaryDirectory() as scratch:
        for found in {What.GROWTH: growing, What.SPEED: speed, What.FEED: feeding}[what](Path(scratch), sizes):
            table += found
            save(out, f"data-{what}", as_markdown(table), as_dicts(table))


def speed(scratch: Path, sizes: Sizes) -> Iterator[list[Row]]:
    tars, shards = scratch / "tars", scratch / "shards"
    write_tars(tars, (photograph(n, sizes.sides) for n in range(sizes.photographs)), sizes.photographs)
    yield writing(tars, scratch / "written", sizes)
    write_dataset(curriculum(tars, shards, RESOLUTIONS, BATCH, max_aspect=1.0, max_upscale=4.0))
    for resolution in RESOLUTIONS:
        yield reading(shards, scratch, resolution, sizes)


def writing(tars: Path, out: Path, sizes: Sizes) -> list[Row]:
    """A partition through the whole chain, against the bare work on its images."""
    job = plan(curriculum(tars, out, RESOLUTIONS, BATCH, max_upscale=4.0))
    (part,) = job.parts()
    (tar,) = tars.iterdir()
    with tarfile.open(tar, encoding="utf-8") as opened:
        images = (opened.extractfile(member) for member in opened if member.name.endswith(".jpg"))
        files = [image.read() for image in images if image]
    (out / LEDGER).mkdir(parents=True)
    numbers = count()

    sides = {
        "decode, fit, encode": lambda: encode(files, job),
        "our chain": lambda: write_partition(job, next(numbers), part),
    }
    title = "Writing a photograph of {} to {} px at 256 and 512 px".format(*sizes.sides)
    return rows(title, in_turns(sides, sizes.rounds), len(files), "decode, fit, encode")


def encode(files: list[bytes], job: Job) -> list[bytes]:
    """The work that cannot be left out: decode each image once, fit it into its bucket at each resolution, encode."""
    made = []
    (resolutions,) = job.resolutions.values()
    sizes = [buckets(resolution, job.prepare.images) for resolution in resolutions]
    for file in files:
        image = Image.open(io.BytesIO(file)).convert("RGB")
        for choices in sizes:
            buffer = io.BytesIO()
            fit(image, *nearest((image.height, image.width), choices)).save(
                buffer, "JPEG", quality=job.prepare.images.quality, subsampling=0
            )
            made.append(buffer.getvalue())
    return made


def reading(shards: Path, scratch: Path, resolution: int, sizes: Sizes) -> list[Row]:
    """Our loader, the bare decoder, WebDataset and `datasets` on the same stored images."""
    found, samples = stored(shards, resolution), sizes.read[resolution]
    epochs = samples // len(found)
    tars, saved = scratch / f"tars-{resolution}", scratch / f"saved-{resolution}"
    write_tars(tars, found, len(found))
    readers.save_hugging_face(found, saved)
    save_processor(scratch / "processor")
    encoder = PromptEncoder(scratch / "processor")

    def decode() -> None:
        for _ in range(epochs):
            for image, _ in found:
                stored_pixels(image)

    def ours(workers: int, encode: Callable[..., Any]) -> readers.Batches:
        return readers.ours(curriculum(tars, shards, (resolution,), BATCH, samples // BATCH, workers), encode)

    sides: dict[str, Callable[[int], readers.Batches]] = {
        "our loader": lambda workers: ours(workers, encoder),
        "our loader, captions not tokenized": lambda workers: ours(workers, readers.captions_alone),
        "WebDataset, same decoder": lambda workers: readers.web(sorted(tars.iterdir()) * epochs, BATCH, workers),
        "datasets, its own decoder": lambda workers: readers.hugging_face(saved, BATCH, samples, workers, "pil"),
        "datasets, same decoder": lambda workers: readers.hugging_face(saved, BATCH, samples, workers, "torchvision"),
    }

    def reader(name: str, workers: int) -> Callable[[], None]:
        return lambda: readers.read_all(sides[name](workers), samples, resolution)

    timed = {"decode": decode} | {
        f"{name}; {workers} worker{'s'[workers:]}": reader(name, workers) for name in sides for workers in (0, 1)
    }
    return rows(f"Reading a sample at {resolution} px", in_turns(timed, sizes.rounds), samples, "decode")


def feeding(scratch: Path, sizes: Sizes) -> Iterator[list[Row]]:
    """The parts of reading a sample at full size, on one core; the rest of the loader checks and collates."""
    px = FEED_PX if sizes is FULL else RESOLUTIONS[0]
    tars, shards, number = scratch / "tars", scratch / "shards", sizes.photographs
    write_tars(tars, (photograph(n, (px, px * 3 // 2)) for n in range(number)), number)
    written = cost(lambda: write_dataset(curriculum(tars, shards, (px,), BATCH, max_aspect=1.0, max_upscale=4.0)))
    save_processor(scratch / "processor")
    encoder, found = PromptEncoder(scratch / "processor"), stored(shards, px)
    pixels = stored_pixels(found[0][0])[None]
    grid = token_grid(px, px, 28)

    def loader() -> None:
        steps = max(1, len(found) // BATCH)
        readers.read_all(readers.ours(curriculum(tars, shards, (px,), BATCH, steps), encoder), steps * BATCH, px)

    sides: dict[str, Callable[[], Any]] = {
        "decode": lambda: [stored_pixels(image) for image, _ in found],
        "tokenize": lambda: [encoder([caption], [[]]) for _, caption in found],
        "our loader, all of it": loader,
        "resize to the VLM's grid (on the device in training)": lambda: [
            resize(pixels, 28 * grid[0], 28 * grid[1]) for _ in found
        ],
    }
    title = f"Feeding a sample of {px} px"
    table = rows(title, in_turns(sides, sizes.rounds), len(found), "decode")
    cpu, wall = written.cpu / number * 1e6, written.wall / number * 1e6
    share = table[0].cpu_us / cpu, table[0].wall_us / wall
    yield [*table, Row(title, "write it, once", cpu, wall, "decode", *share)]


def growing(scratch: Path, sizes: Sizes) -> Iterator[list[Row]]:
    """Data sets of more and more small images, each written and read by a process of its own."""
    for records in sizes.records:
        tars, shards = scratch / f"tars-{records}", scratch / f"shards-{records}"
        write_tars(tars, distinct(records, (72, 96), drawn=500), 1000)
        for what in ("write", "read"):
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                taken: dict[str, Any] = process.submit(one_size, what, tars, shards, records).result()
            yield [Row("Growing data sets, at 64 px", f"{what} {records:,} records", **taken)]
        shutil.rmtree(tars)
        shutil.rmtree(shards)


def one_size(what: str, tars: Path, shards: Path, records: int) -> dict[str, float]:
    """Write a data set of square images of 64 px, or read an epoch of it with one worker; what that took."""
    torch.set_num_threads(1)
    px = 64
    job = curriculum(tars, shards, (px,), BATCH, steps=records // BATCH, workers=1, max_aspect=1.0)
    if what == "write":
        taken = cost(lambda: write_dataset(job))
    else:
        batches = readers.ours(job, readers.captions_alone)
        taken = cost(lambda: readers.read_all(batches, records // BATCH * BATCH, px))
    return {f"{clock}_us": value / records * 1e6 for clock, value in asdict(taken).items()} | {"peak_mb": peak_mb()}


if __name__ == "__main__":
    typer.run(main)
