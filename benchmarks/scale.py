"""Writes or reads a data set in a process of its own and prints what it took: `python -m benchmarks.scale --help`."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
import typer

from benchmarks.datasets import curriculum, write_dataset
from benchmarks.measure import cost, peak_mb

PX = 64
BATCH = 16


def main(what: Literal["write", "read"], tars: Path, shards: Path, records: int) -> None:
    """Square images of 64 px; reading is one epoch with one worker."""
    torch.set_num_threads(1)
    job = curriculum(tars, shards, (PX,), BATCH, steps=records // BATCH, workers=1, max_aspect=1.0)
    # What every run pays once, whatever its size, is imports.
    import streaming  # noqa: F401

    from benchmarks.readers import captions_alone, ours, read_all

    if what == "write":
        taken = cost(lambda: write_dataset(job))
    else:
        taken = cost(lambda: read_all(ours(job, captions_alone), records // BATCH * BATCH, PX))
    print(json.dumps({**asdict(taken), "peak_mb": peak_mb()}))


if __name__ == "__main__":
    typer.run(main)
