"""One training step of ours against the naive one, with equal widths, weights, batches and losses.

    OMP_NUM_THREADS=1 python -m benchmarks.step miniature        # 3 minutes
    OMP_NUM_THREADS=1 python -m benchmarks.step middle           # 300 M parameters, some 20 minutes
    python -m benchmarks.step real                       # a GPU, bfloat16: the published sizes, under 10 minutes
    python -m benchmarks.step real --engine zero3        # the same, ours alone, on one rank of ZeRO-3

What the naive step is, and what is done so that both compute the same: `benchmarks/naive.py` and `step_variants.py`.
Where several variants fit into one process they take turns in it, and only ratios within a round mean something; else
each has a process of its own. Memory is the most that a step adds to what rests between steps (weights, masters,
moments), resident on the CPU, allocated by torch on a GPU. FLOPs are those of the products of a step, counted without
computing them (`wemmu.measuring`); MFU takes ours for all variants: what is recomputed and logits are work of no use.
"""

import multiprocessing
import os
import shlex
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.measure import RESULTS, Out, cost, in_turns, watch
from benchmarks.step_profile import shares
from benchmarks.step_report import record
from benchmarks.step_sizes import SIZES, Cell, Size, shallower
from benchmarks.step_variants import ENDS, OURS, VARIANTS, Off, counted_flops, prepare

# Dense bf16 of an H100 or H200 (SXM), FLOP/s; other devices are measured by a large product.
PUBLISHED_PEAK = 989e12
# See there.
PRELOADED = "benchmarks.preloaded"
OFF = tuple(field.name for field in fields(Off))


@dataclass(frozen=True)
class Settings:
    """What all measurements have in common."""

    size: str
    device: str
    dtype: str
    engine: str
    layers: int | None
    samples: int | None

    def load(self) -> Size:
        size = SIZES[self.size]()
        return size if self.layers is None else shallower(size, self.layers)

    def cells(self) -> list[Cell]:
        cells = self.load().cells
        return [c if self.samples is None else c.of(self.samples) for c in cells]


def main(
    size: Annotated[str, typer.Argument(help=", ".join(SIZES))],
    engine: Annotated[str, typer.Option(help="of ours: single or zero3 (one rank)")] = "single",
    device: Annotated[str, typer.Option(help="cpu or cuda; by default where the size belongs")] = "",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16; by default that of the device")] = "",
    rounds: Annotated[int, typer.Option(help="steps of each variant that count")] = 3,
    layers: Annotated[int | None, typer.Option(help="at most so many layers, at full width")] = None,
    samples: Annotated[int | None, typer.Option(help="samples of a micro-batch, instead of the size's own")] = None,
    trace: Annotated[Path | None, typer.Option(help="folder for the profiler's timelines of ours")] = None,
    out: Out = RESULTS,
) -> None:
    settings = _settings(size, device, dtype, engine, layers, samples)
    begun = time.monotonic()
    cells = []
    for cell in settings.cells():
        cells.append(_compare(settings, cell, rounds, trace))
        print(record(_head(settings, rounds, begun), cells, size, out), flush=True)


def _settings(size: str, device: str, dtype: str, engine: str, layers: int | None, samples: int | None) -> Settings:
    if size not in SIZES or engine not in ("single", "zero3"):
        sys.exit(f"there is no size {size!r} or no engine {engine!r}; valid: {', '.join(SIZES)}; single, zero3")
    device = device or ("cuda" if size == "real" else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"size {size} on cuda: torch sees no GPU here; valid without one: miniature and middle on the cpu")
    if size == "real" and device == "cpu":
        sys.exit("size real has 11 B parameters and needs a GPU; valid on the cpu: miniature, middle")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    return Settings(size, device, dtype or ("bfloat16" if device == "cuda" else "float32"), engine, layers, samples)


def _head(settings: Settings, rounds: int, begun: float) -> dict[str, Any]:
    threads = f"OMP_NUM_THREADS={torch.get_num_threads()} " if settings.device == "cpu" else ""
    where = torch.cuda.get_device_name() if settings.device == "cuda" else f"{len(os.sched_getaffinity(0))} cores"
    return {
        "command": threads + shlex.join(["python", "-m", "benchmarks.step", *sys.argv[1:]]),
        "settings": asdict(settings),
        "where": where,
        "torch": torch.__version__,
        "load": os.getloadavg()[1],
        "rounds": rounds,
        "minutes": (time.monotonic() - begun) / 60,
    }


def _compare(settings: Settings, cell: Cell, rounds: int, trace: Path | None) -> dict[str, Any]:
    """Everything about one cell: a row for each variant, what they are measured with, and our profile."""
    size = settings.load()
    names = VARIANTS if size.together else OURS if settings.engine == "zero3" else ENDS
    flops = counted_flops(size, cell, names)
    found: dict[str, dict[str, Any]] = {}
    for group in [list(names)] if size.together else [[name] for name in names]:
        found |= apart(settings, cell, group, rounds, trace)
    # Variants that do not fit have no times and no memory.
    kept = ("seconds", "memory", "cpu_seconds") if size.together else ("seconds", "memory")
    cell_report: dict[str, Any] = {
        "cell": cell.name,
        "floor": flops["ours"],
        "flops": {name: number / flops["ours"] for name, number in flops.items()},
        **{key: {name: each.get(key) for name, each in found.items()} for key in kept},
        **{key: max(each.get(key, 0.0) for each in found.values()) for key in ("rate", *OFF)},
        "profile": found["ours"].get("profile", {}),
    }
    name = torch.cuda.get_device_name() if settings.device == "cuda" and settings.dtype == "bfloat16" else ""
    cell_report["peak"] = peak_of(name, cell_report["rate"])
    return cell_report


def peak_of(gpu: str, rate: float) -> float:
    """FLOP/s of bfloat16 that MFU refers to: the published one or, of another device, what a large product reaches."""
    return PUBLISHED_PEAK if any(name in gpu for name in ("H100", "H200")) else rate


def apart(
    settings: Settings,
    cell: Cell,
    names: Sequence[str],
    rounds: int,
    trace: Path | None = None,
    profile: bool = True,
) -> dict[str, dict[str, Any]]:
    """Variant -> what was measured, in a process that has these alone; empty for one that does not fit."""
    # The libraries take ten seconds to import: once, in the server that the processes are forked from.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([PRELOADED])
    with ProcessPoolExecutor(1, context) as process:
        return process.submit(_alone, settings, cell, names, rounds, trace, profile).result()


def _alone(
    settings: Settings, cell: Cell, names: Sequence[str], rounds: int, trace: Path | None, profile: bool
) -> dict[str, dict[str, Any]]:
    """In this process: the memory of each variant's step, and its times, in turns with a large product."""
    device = torch.device(settings.device)
    found: dict[str, dict[str, Any]] = {name: {} for name in names}
    try:
        steps, off = prepare(settings.load(), cell, names, settings.engine, device, settings.dtype)
        for name, step in steps.items():
            # On a GPU the first step compiles, and tries kernels on copies of their arguments.
            first = cost(step).wall if device.type == "cuda" else 0.0
            with watch(device) as memory:
                step()
            found[name] = {**asdict(off), "first": first, "memory": asdict(memory)}
        product, flop = _large_product(device, settings.dtype)
        costs = in_turns({**steps, "product": product}, rounds)
        for name in steps:
            walls, cpus = zip(*((cost.wall, cost.cpu) for cost in costs[name]), strict=True)
            rate = flop / min(cost.wall for cost in costs["product"])
            found[name] |= {"seconds": list(walls), "cpu_seconds": list(cpus), "rate": rate}
        if profile and "ours" in steps:
            found["ours"]["profile"] = shares(steps["ours"], device, _timeline(trace, settings, cell))
    except torch.OutOfMemoryError:
        found = {name: {} for name in names}
    return found


def _timeline(trace: Path | None, settings: Settings, cell: Cell) -> Path | None:
    return trace and trace / f"{settings.size}-{settings.engine}-{cell.stage.replace(' ', '')}-{cell.task}.json"


def _large_product(device: torch.device, dtype: str) -> tuple[Any, float]:
    """A product of square matrices, and its FLOPs."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))

    def product() -> None:
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return product, 2.0 * n**3


if __name__ == "__main__":
    typer.run(main)
