"""How fast data are written and read, against the bare work and against other readers.

    OMP_NUM_THREADS=1 python -m benchmarks.data speed      # some 10 minutes
    OMP_NUM_THREADS=1 python -m benchmarks.data growth     # from 10^3 to 10^5 records, time and memory

All sides of a comparison run in turns in this one process (readers with workers: in its children), several rounds.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
import typer

from benchmarks import bare, readers
from benchmarks.datasets import (
    curriculum,
    distinct,
    photograph,
    stored,
    write_dataset,
    write_tars,
)
from benchmarks.measure import Row, as_dicts, as_markdown, in_turns, rows
from data_pipeline.duplicates import scan_file, scan_part
from data_pipeline.partitions import write_partition
from data_pipeline.plan import plan
from wemmu.config.shards import LEDGER
from wemmu.pixels import stored_pixels
from wemmu.prompts import PromptEncoder
from wemmu.shapes.processor import save_processor

ROOT = Path(__file__).resolve().parents[1]
RESOLUTIONS = (256, 512)
BATCH = 16


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


def main(
    what: What,
    quick: Annotated[bool, typer.Option(help="tiny sizes, to see that everything runs")] = False,
    out: Annotated[Path, typer.Option(help="where data-WHAT.{json,md} go")] = ROOT / "benchmarks" / "results",
) -> None:
    torch.set_num_threads(1)
    # Readers with workers fork.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    datasets.disable_progress_bars()
    sizes = QUICK if quick else FULL
    with tempfile.TemporaryDirectory() as scratch:
        if what is What.GROWTH:
            print(save(growing(Path(scratch, "growing"), sizes), out, what))
            return
        tars, shards = Path(scratch, "tars"), Path(scratch, "shards")
        write_tars(tars, (photograph(n, sizes.sides) for n in range(sizes.photographs)), sizes.photographs)
        table = writing(tars, Path(scratch, "written"), sizes)
        save(table, out, what)
        write_dataset(curriculum(tars, shards, RESOLUTIONS, BATCH, max_aspect=1.0, max_upscale=4.0))
        for resolution in RESOLUTIONS:
            table += reading(shards, Path(scratch), resolution, sizes)
            save(table, out, what)
    print(as_markdown(table))


def save(table: list[Row], out: Path, what: What) -> str:
    """Write what has been measured so far; returns the text."""
    command = "OMP_NUM_THREADS=1 " + shlex.join(["python", "-m", "benchmarks.data", *sys.argv[1:]])
    out.mkdir(parents=True, exist_ok=True)
    text = f"`{command}`, {len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[1]:.1f}\n\n{as_markdown(table)}"
    (out / f"data-{what}.md").write_text(text, encoding="utf-8")
    (out / f"data-{what}.json").write_text(
        json.dumps({"command": command, "rows": as_dicts(table)}, indent=1) + "\n", encoding="utf-8"
    )
    return text


def writing(tars: Path, out: Path, sizes: Sizes) -> list[Row]:
    """A partition through the whole chain, against the bare work on its images."""
    job = plan(curriculum(tars, out, RESOLUTIONS, BATCH, max_upscale=4.0))
    (part,) = job.parts()
    files, quality = bare.images(tars), job.prepare.pictures.quality
    buckets = bare.buckets_of(files, job)
    made = bare.encode(files, buckets, quality)
    (out / LEDGER).mkdir(parents=True)
    scan_file(out, 0).parent.mkdir()
    numbers = count()

    def bare_mds() -> None:
        bare.mds(made, out / "bare")
        shutil.rmtree(out / "bare")

    sides = {
        "decode, fit, encode": lambda: bare.encode(files, buckets, quality),
        "our chain": lambda: write_partition(job, next(numbers), part),
        "a bare MDS writer with sha256": bare_mds,
        "our search for duplicates": lambda: scan_part(job, 0, part),
    }
    title = "Writing a photograph of {} to {} px at 256 and 512 px".format(*sizes.sides)
    return rows(title, in_turns(sides, sizes.rounds), len(files), "decode, fit, encode")


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

    def ours(workers: int, encode: Callable[..., Any], contiguous: bool = False) -> readers.Batches:
        job = curriculum(tars, shards, (resolution,), BATCH, samples // BATCH, workers)
        return readers.ours(job, encode, contiguous)

    sides: dict[str, Callable[[int], readers.Batches]] = {
        "our loader": lambda workers: ours(workers, encoder),
        "our loader, captions not tokenized": lambda workers: ours(workers, readers.captions_alone),
        "the same, channels first in memory": lambda workers: ours(workers, readers.captions_alone, contiguous=True),
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


def growing(scratch: Path, sizes: Sizes) -> list[Row]:
    """Data sets of more and more small images, each written and read by a process of its own."""
    table = []
    for records in sizes.records:
        tars, shards = scratch / f"tars-{records}", scratch / f"shards-{records}"
        write_tars(tars, distinct(records, (72, 96), drawn=500), 1000)
        for what in ("write", "read"):
            command = [sys.executable, "-m", "benchmarks.scale", what, tars, shards, str(records)]
            said = json.loads(subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)
            each = {f"{clock}_us": said[clock] / records * 1e6 for clock in ("cpu", "wall")}
            table.append(
                Row("Growing data sets, at 64 px", f"{what} {records:,} records", peak_mb=said["peak_mb"], **each)
            )
        shutil.rmtree(tars)
        shutil.rmtree(shards)
    return sorted(table, key=lambda row: row.name.split()[0], reverse=True)


if __name__ == "__main__":
    typer.run(main)
