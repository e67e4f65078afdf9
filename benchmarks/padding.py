"""How much of a step's tokens is padding: samples as they are drawn, or sorted by length as the loader does.

    OMP_NUM_THREADS=1 python -m benchmarks.padding           # counted, then a step of two middle-sized layers timed

Prompts have 20 to 200 tokens by a log-normal distribution (median 60), and an edit 256 image tokens more.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
import typer

from benchmarks import step_sizes
from benchmarks.measure import Quick, in_turns
from benchmarks.step_sizes import Cell, make_batch, make_model, make_run, middle, miniature, second, shallower
from wemmu.config.task import Task
from wemmu.parallel.topology import ALONE
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.training.build import make_engine

Lengths = npt.NDArray[np.int64]
SAMPLES, STEPS = (4, 8, 12), 400
ACCUMULATION = (1, 2, 4, 8, 16, 36)
IMAGE = 256
# Tokens of pathway and DiT of a sample at 512 px: they are never padded.
OTHERS = 18**2 + 16**2


def lengths(count: int, random: np.random.Generator) -> Lengths:
    return np.clip(np.exp(random.normal(np.log(60), 0.6, count)), 20, 200).astype(np.int64)


def micro_batches(drawn: Lengths, samples: int, in_order: bool) -> Iterator[Lengths]:
    yield from (np.sort(drawn) if in_order else drawn).reshape(-1, samples)


def share(samples: int, accumulation: int, in_order: bool, further: int = 0) -> float:
    """Padding / all tokens, where each sample has `further` tokens beside its text."""
    random, padding, every = np.random.default_rng(0), 0, 0
    for _ in range(STEPS):
        for batch in micro_batches(lengths(samples * accumulation, random), samples, in_order):
            padding += int((batch.max() - batch).sum())
            every += int(batch.max() + further) * samples
    return padding / every


def timed(samples: int, accumulation: int, rounds: int, quick: bool) -> float:
    """CPU time of a step as drawn / sorted, the median of the rounds."""
    size, device = miniature() if quick else shallower(middle(), 2), torch.device("cpu")
    cell: Cell = second(Task.T2I, 64 if quick else 256, samples)
    model = make_model(size, device, torch.float32)
    run = make_run(cell.of(samples * accumulation), "single", "float32")
    model.freeze_all_but(cell.trains)
    engine = make_engine(run, model, FlowMatchingLoss(model, run), ALONE, device)
    drawn = lengths(samples * accumulation, np.random.default_rng(1))

    def batches(in_order: bool) -> list[Any]:
        found = []
        for texts in micro_batches(drawn, samples, in_order):
            with mock.patch.object(step_sizes, "text_lengths", lambda *_, texts=texts: texts.tolist()):
                found.append(make_batch(size, cell, model.vlm.token_px))
        return found

    def step(found: Sequence[Any]) -> None:
        engine.accumulate(found, 0)
        engine.step(1.0)

    sides = {name: batches(name == "sorted") for name in ("as drawn", "sorted")}
    step(sides["sorted"])
    costs = in_turns({name: partial(step, found) for name, found in sides.items()}, rounds)
    return median(a.cpu / b.cpu for a, b in zip(costs["as drawn"], costs["sorted"], strict=True))


def main(quick: Quick = False) -> None:
    print(
        "| micro-batch | accumulation | of the text, as drawn | sorted | of all T2I tokens | sorted | edits | sorted |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for samples, accumulation in itertools.product(SAMPLES, ACCUMULATION):
        found = [share(samples, accumulation, how, more) for more in (0, OTHERS, OTHERS + IMAGE + 18**2)
                 for how in (False, True)]  # fmt: skip
        print(f"| {samples} | {accumulation} | " + " | ".join(f"{x:.1%}" for x in found) + " |", flush=True)
    ratio = timed(4, 4, 3, quick)
    print(f"\nCPU time of a step of 4 micro-batches of 4, as drawn / sorted: {ratio:.3f}")


if __name__ == "__main__":
    typer.run(main)
