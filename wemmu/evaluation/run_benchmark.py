"""Runs one benchmark: generates what is missing, scores everything, writes the card and its page."""

import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from wemmu import batch_job
from wemmu.checkpoint.manifest import sha256_of
from wemmu.config import StageRun
from wemmu.config.benchmarks import BenchmarkOptions
from wemmu.evaluation.benchmark import BenchmarkError, Mark, benchmark_class
from wemmu.evaluation.benchmark_page import write_page
from wemmu.evaluation.card import write_card
from wemmu.evaluation.generation import Draw, adopt, generate, in_batches, load, missing, prepared, wait_for_others
from wemmu.heartbeat import beat

Only = Literal["generate", "score"]


def run_benchmark(
    name: str,
    options: BenchmarkOptions,
    run: StageRun | None,
    folder: Path,
    open_model: Callable[[], Draw] | Path,
    settings: Mapping[str, Any],
    only: Only | None = None,
    replace: bool = False,
) -> dict[str, Any] | None:
    """Run a benchmark in `folder`; return the card, None if this process only generates.

    Of several ranks, each generates its share, and rank 0 waits for the others and scores.

    open_model: loads the model; not called if nothing is missing. Or a folder of images that another program wrote in
    the benchmark's published layout. settings: what the images depend on. replace: whether images of other settings in
    the folder are deleted, else they are an error.
    """
    benchmark = benchmark_class(name)(options, run)
    if not benchmark.generates and not isinstance(open_model, Path):
        raise BenchmarkError(f"{benchmark.title} generates nothing: give the folder of its images as SOURCE")
    requests = benchmark.requests()
    rank, world = share()
    settings = {**settings, "seed": options.seed}
    given = benchmark.adopt(open_model) if isinstance(open_model, Path) else {}
    if given:
        sums = "".join(sha256_of(file) for file in given.values())
        settings["images"] = hashlib.sha256(sums.encode()).hexdigest()
    with prepared(folder, requests, settings, replace):
        if isinstance(open_model, Path):
            adopt(folder, requests, given)
        elif only != "score":
            batches = in_batches(requests, options.batch)[rank::world]
            if lacking := [several for several in batches if missing(folder, several)]:
                generate(folder, lacking, open_model())
        if only == "generate" or rank > 0:
            print(f"{folder} holds the images of rank {rank} of {world}", flush=True)
            return None
        if world > 1 and only is None:
            wait_for_others(folder, requests)
        marks = []
        for request, values in zip(requests, benchmark.judge(load(folder, requests)), strict=True):
            beat()
            marks.append(Mark(request.key, request.category, request.unit, values))
            if len(marks) % 100 == 0 or len(marks) == len(requests):
                print(f"judged {len(marks)}/{len(requests)}", flush=True)
        card = write_card(folder, name, benchmark, marks, settings, options.resamples)
        write_page(folder, card, marks)
        return card


def share() -> tuple[int, int]:
    """Return rank and world of this process: of torchrun or Slurm's srun, else alone."""
    for said in (os.environ, batch_job.task()):
        if "RANK" in said and "WORLD_SIZE" in said:
            return int(said["RANK"]), int(said["WORLD_SIZE"])
    return 0, 1
