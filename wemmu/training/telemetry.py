"""Records metrics of a run in metrics.jsonl, which the terminal, the pages and W&B show.

docs/monitoring.md explains each key.
"""

import json
import math
import resource
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wemmu.config.files import naming
from wemmu.jsonlines import read_lines, write_lines
from wemmu.parallel.topology import gathered
from wemmu.readable import duration
from wemmu.types import Losses, Prepared

GB = 1e9


class Window:
    """Sums over the steps since the last line of the record; `tasks` are those of the mixture."""

    def __init__(self, tasks: Iterable[str], device: torch.device | str = "cpu") -> None:
        self.started = time.monotonic()
        self.steps = 0
        self.waited = 0.0
        self.counts: Counter[str] = Counter()
        self._tasks, self._device = tuple(tasks), torch.device(device)
        # Name -> [sum, number of samples], on the device: reading them would make every step wait.
        self._sums: dict[str, Tensor] = {}
        self._seconds: dict[str, float] = {}
        self._ranges: dict[str, tuple[float, float]] = {}
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def add(self, losses: Losses) -> None:
        """Add the losses of a micro-batch to the means over all samples and to those of its tags."""
        values = losses.values.double()
        every = torch.ones_like(values, dtype=torch.bool)
        counted = {key: (values, mask) for key, mask in {"loss": every, **losses.tags}.items()}
        counted |= {key: (part.double(), every) for key, part in losses.parts.items()}
        for key, (of, mask) in counted.items():
            found = torch.stack([of.where(mask, 0.0).sum(), mask.sum()])
            self._sums[key] = self._sums[key] + found if key in self._sums else found

    def note(self, prepared: Prepared, update: float) -> None:
        """Add a step's times and ranges; `update`: seconds of its forward and backward passes and of the optimizer."""
        if prepared.times:
            for name, seconds in {**prepared.times, "update": update}.items():
                self._seconds[name] = self._seconds.get(name, 0.0) + seconds
        for name, (least, most) in prepared.ranges.items():
            before = self._ranges.get(name, (least, most))
            self._ranges[name] = min(least, before[0]), max(most, before[1])

    def close(self) -> dict[str, float]:
        """Return the window's mean losses, rates and shares over all ranks, which must all call it."""
        elapsed = time.monotonic() - self.started
        sums = {key: tuple(pair.tolist()) for key, pair in self._sums.items()}
        ranks = gathered((sums, self.counts, self.waited, _memory(self._device), self._seconds))
        counts = sum((rank[1] for rank in ranks), Counter[str]())
        samples = sum(rank[0]["loss"][1] for rank in ranks)
        rates = {f"{key}_per_s": counts[key] / elapsed for key in ("tokens", "flops") if key in counts}
        if "tokens" in counts:
            rates["padding_share"] = counts["padding"] / (counts["tokens"] + counts["padding"])
        return {
            **_means([rank[0] for rank in ranks]),
            "samples_per_s": samples / elapsed,
            **rates,
            # The others wait for the slowest.
            "data_wait_share": max(rank[2] for rank in ranks) / elapsed,
            **{f"memory/{key}_gb": max(rank[3][key] for rank in ranks) / GB for key in ranks[0][3]},
            **{f"share/{task}": counts[task] / samples for task in self._tasks},
            **{f"time/{key}_s": max(rank[4][key] for rank in ranks) / self.steps for key in self._seconds},
            **{f"{key}/min": least for key, (least, _) in self._ranges.items()},
            **{f"{key}/max": most for key, (_, most) in self._ranges.items()},
        }


def _means(ranks: list[dict[str, tuple[float, float]]]) -> dict[str, float]:
    totals: dict[str, tuple[float, float]] = {}
    for sums in ranks:
        for key, (total, count) in sums.items():
            before = totals.get(key, (0.0, 0.0))
            totals[key] = before[0] + total, before[1] + count
    return {key: total / count for key, (total, count) in totals.items() if count}


def _memory(device: torch.device) -> dict[str, float]:
    """Return peak bytes: on the GPU since the window began, on the host since the process began."""
    # Linux counts in KiB.
    held: dict[str, float] = {"host": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device.type == "cuda":
        held["gpu_allocated"] = torch.cuda.max_memory_allocated(device)
        held["gpu_reserved"] = torch.cuda.max_memory_reserved(device)
    return held


class Record:
    """The file metrics.jsonl of a run folder, one JSON object a line, appended."""

    def __init__(self, file: Path, resumed_at: int):
        """Drop lines that a killed run wrote after the checkpoint it resumes from."""
        self._file = file
        if file.exists():
            write_lines(file, (line for line in read_lines(file) if line.get("step", math.inf) <= resumed_at))

    def write(self, values: dict[str, Any]) -> None:
        with naming(self._file), self._file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(values) + "\n")


def progress_line(stage: str, step: int, steps: int, values: dict[str, float], rate: float) -> str:
    """Return one line: step, losses, speed (`rate`: steps per second) and remaining time."""
    left = (steps - step) / rate if rate else float("inf")
    tasks = "  ".join(
        f"{key.removeprefix('loss/')} {value:.3f}"
        for key, value in values.items()
        if key.startswith("loss/") and not key.startswith("loss/t_")
    )
    more = f"MFU {values['mfu']:.1%}  " if "mfu" in values else ""
    # Of a policy the loss says nothing.
    more += f"reward {values['reward']:.4f}  " if "reward" in values else ""
    return (
        f"{stage}  step {step}/{steps}  loss {values['loss']:.4f}  ({tasks})  {values['samples_per_s']:.0f} samples/s  "
        f"{more}{duration(left)} left"
    )
