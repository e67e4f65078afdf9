"""What a checkpoint costs the training: written at once, and in the background.

    OMP_NUM_THREADS=1 python -m benchmarks.checkpoint      # some 5 minutes

In every round a real engine takes the same number of steps without saving, saving at once before the first, and saving
in the background, in turns. All is told in steps of the same round without saving, since the machine is shared: only
ratios mean something, and how much, a second time without saving tells. Buffers are filled by a round that does not
count, as a run's first save makes them.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import typer
from torch import nn

from benchmarks.measure import RESULTS, Out, Quick, save
from wemmu.checkpoint import retention, store
from wemmu.checkpoint.manifest import Origin
from wemmu.checkpoint.saver import Saver
from wemmu.config.stage import Optimizer
from wemmu.parallel.single import SingleEngine
from wemmu.types import Losses

KEEP = 2
NOISE = "not at all, once more"
ORIGIN = Origin("benchmark", 0, 0, {})


@dataclass(frozen=True)
class Sizes:
    """A stack of `layers` square matrices; `steps` between saves are more than a save in the background takes."""

    layers: int
    width: int
    batch: int
    steps: int
    rounds: int


FULL = Sizes(layers=26, width=1024, batch=64, steps=12, rounds=7)
QUICK = Sizes(layers=2, width=64, batch=4, steps=2, rounds=1)


@dataclass(frozen=True)
class Window:
    """Seconds: in the call that saves, until the last step is done, and until all is on the disk."""

    call: float
    steps: float
    written: float


def main(quick: Quick = False, out: Out = RESULTS) -> None:
    torch.set_num_threads(1)
    sizes = QUICK if quick else FULL
    engine, step = make_engine(sizes)
    with tempfile.TemporaryDirectory() as scratch:
        saver = Saver(Path(scratch), KEEP, ORIGIN)

        def at_once() -> None:
            store.save(Path(scratch), engine.state(), {}, ORIGIN)
            retention.prune(Path(scratch), KEEP)

        def window(save: Callable[[], None]) -> Window:
            begun = time.perf_counter()
            save()
            called = time.perf_counter()
            for _ in range(sizes.steps):
                step()
            stepped = time.perf_counter()
            saver.wait()
            return Window(called - begun, stepped - begun, time.perf_counter() - begun)

        sides = {
            "none": lambda: None,
            NOISE: lambda: None,
            "at once": at_once,
            "in the background": lambda: saver.save(engine.state(), {}),
        }
        rounds: list[dict[str, Window]] = []
        for number in range(sizes.rounds + 1):
            rounds.append({name: window(sides[name]) for name in sorted(sides, reverse=bool(number % 2))})
        saver.close()
    write(rounds[1:], sizes, engine, out)


def make_engine(sizes: Sizes) -> tuple[SingleEngine, Callable[[], Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(sizes.width, sizes.width, bias=False) for _ in range(sizes.layers)))
    x = torch.randn(sizes.batch, sizes.width)
    loss = lambda batch, step: Losses(model(x).square().mean(1), {})  # noqa: E731
    nothing: Any = [None]
    engine = SingleEngine(model, loss, Optimizer(lr=1e-4), sizes.batch)

    def step() -> None:
        engine.accumulate(nothing, 0)
        engine.step(1.0)

    return engine, step


def write(rounds: list[dict[str, Window]], sizes: Sizes, engine: SingleEngine, out: Path) -> None:
    """One row a side: medians over the rounds, and all rounds."""
    state = engine.parameters[0] * 3 * 4 / 1e6
    rows: list[dict[str, Any]] = []
    for side in (NOISE, "at once", "in the background"):
        columns: dict[str, list[float]] = {"call": [], "lost": [], "late": []}
        for each in rounds:
            mine, none = each[side], each["none"].steps
            seconds = {"call": mine.call, "lost": mine.written - none, "late": mine.written - mine.steps}
            for name, value in seconds.items():
                columns[name].append(value / (none / sizes.steps))
        rows.append({"saving": side} | {name: median(values) for name, values in columns.items()} | {"rounds": columns})
    lines = [
        f"{state:.0f} MB of state. In steps of the same round without saving; median of {len(rounds)} rounds, least "
        "and most.",
        "",
        "| saving | the step waits | lost until all is on the disk | of which after the last step |",
        "|---|---:|---:|---:|",
        *(f"| {row['saving']} | {' | '.join(map(spread, row['rounds'].values()))} |" for row in rows),
    ]
    save(out, "checkpoint", lines, rows, state_mb=state, steps=sizes.steps)


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    typer.run(main)
