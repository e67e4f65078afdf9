"""Times of things that are compared: taken side by side, in turns, so that a busy machine hurts all of them alike.

And the memory that something needs: resident on the CPU, allocated by torch on a GPU.
"""

import ctypes
import gc
import json
import os
import resource
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer

ROOT = Path(__file__).resolve().parents[1]
# The options that all benchmarks have.
Out = Annotated[Path, typer.Option(help="where the results go, as NAME.json and NAME.md")]
Quick = Annotated[bool, typer.Option(help="tiny sizes, to see that everything runs")]
RESULTS = ROOT / "benchmarks" / "results"


@dataclass(frozen=True)
class Cost:
    """Seconds: on the wall, and of CPU in this process (all threads) with the children that it has waited for."""

    wall: float
    cpu: float


@dataclass(frozen=True)
class Row:
    """A line of the table. Costs are in microseconds a sample; `share` is the rate over that of `against`."""

    part: str
    name: str
    cpu_us: float
    wall_us: float
    against: str = ""
    share_cpu: float | None = None
    share_wall: float | None = None
    peak_mb: float | None = None


def cost(function: Callable[[], Any]) -> Cost:
    gc.collect()
    wall, cpu = time.perf_counter(), _cpu()
    function()
    return Cost(time.perf_counter() - wall, _cpu() - cpu)


def in_turns(sides: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Cost]]:
    """The cost of every side in every round; the order is turned round from one to the next."""
    costs: dict[str, list[Cost]] = {name: [] for name in sides}
    for number in range(rounds):
        for name in sorted(sides, reverse=bool(number % 2)):
            costs[name].append(cost(sides[name]))
    return costs


def rows(part: str, costs: Mapping[str, list[Cost]], samples: int, against: str) -> list[Row]:
    """Medians over the rounds. A share is the median of the shares within each round."""

    def share(name: str, clock: str) -> float:
        pairs = zip(costs[against], costs[name], strict=True)
        return median(getattr(ours, clock) / getattr(theirs, clock) for ours, theirs in pairs)

    return [
        Row(
            part,
            name,
            median(c.cpu for c in taken) / samples * 1e6,
            median(c.wall for c in taken) / samples * 1e6,
            against,
            share(name, "cpu"),
            share(name, "wall"),
        )
        for name, taken in costs.items()
    ]


def peak_mb() -> float:
    """The most memory this process ever had resident; getrusage would count the parent's, too, from before exec."""
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


@dataclass
class Memory:
    """In MB. before: held when it began; peak: the most there was from then on."""

    before: float = 0.0
    peak: float = 0.0


@contextmanager
def watch(device: torch.device) -> Iterator[Memory]:
    """Memory of what is done inside; filled in at the end."""
    memory = Memory()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        memory.before = torch.cuda.memory_allocated(device) / 2**20
        yield memory
        memory.peak = torch.cuda.max_memory_allocated(device) / 2**20
        return
    # Memory that was freed but not given back would hide what is allocated anew.
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # Sets the peak of this process to what is resident now (man 5 proc).
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    memory.before = peak_mb()
    yield memory
    memory.peak = peak_mb()


def save(out: Path, name: str, lines: list[str], rows: list[dict[str, Any]], **about: Any) -> None:
    """Write and print a result, with the command and the machine that it comes from; `lines` are its Markdown."""
    command = "OMP_NUM_THREADS=1 " + shlex.join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]])
    about = {"command": command, "cores": len(os.sched_getaffinity(0)), "load": os.getloadavg()[1], **about}
    text = f"`{command}`, {about['cores']} cores, load {about['load']:.1f}\n\n" + "\n".join(lines) + "\n"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    (out / f"{name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(text, flush=True)


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A table in Markdown, whose first column names the row."""
    lines = [f"| {' | '.join(columns)} |", f"|---|{'---:|' * (len(columns) - 1)}"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def as_dicts(rows: list[Row]) -> list[dict[str, Any]]:
    return [{field: value for field, value in asdict(row).items() if value not in (None, "")} for row in rows]


def as_markdown(rows: list[Row]) -> list[str]:
    """One table for each part. The wall's share stands in brackets: other programs run on the machine."""
    lines: list[str] = []
    for part in dict.fromkeys(row.part for row in rows):
        chosen = [row for row in rows if row.part == part]
        peaks = any(row.peak_mb is not None for row in chosen)
        last = "peak memory, MB" if peaks else f"share of `{chosen[0].against}`, CPU (wall)"
        cells = []
        for row in chosen:
            end = f"{row.peak_mb:.0f}" if peaks else f"{row.share_cpu:.0%} ({row.share_wall:.0%})"
            cells.append([row.name, f"{1e6 / row.cpu_us:.0f}", f"{row.cpu_us:.0f}", f"{row.wall_us:.0f}", end])
        lines += ["", f"### {part}", "", *table(["what", "per core-second", "CPU, us", "wall, us", last], cells)]
    return lines[1:]


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
