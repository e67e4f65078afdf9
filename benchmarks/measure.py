"""Times of things that are compared: taken side by side, in turns, so that a busy machine hurts all of them alike."""

import gc
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any


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
    (line,) = (
        line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM")
    )
    return int(line.split()[1]) / 1024


def as_dicts(table: list[Row]) -> list[dict[str, Any]]:
    return [{field: value for field, value in asdict(row).items() if value not in (None, "")} for row in table]


def as_markdown(table: list[Row]) -> str:
    """One table for each part. The wall's share stands in brackets: other programs run on the machine."""
    lines: list[str] = []
    for part in dict.fromkeys(row.part for row in table):
        chosen = [row for row in table if row.part == part]
        peaks = any(row.peak_mb is not None for row in chosen)
        last = "peak memory, MB" if peaks else f"share of `{chosen[0].against}`, CPU (wall)"
        lines += ["", f"### {part}", "", f"| what | per core-second | CPU, us | wall, us | {last} |"]
        lines += ["|---|---:|---:|---:|---:|"]
        for row in chosen:
            end = f"{row.peak_mb:.0f}" if peaks else f"{row.share_cpu:.0%} ({row.share_wall:.0%})"
            lines.append(f"| {row.name} | {1e6 / row.cpu_us:.0f} | {row.cpu_us:.0f} | {row.wall_us:.0f} | {end} |")
    return "\n".join(lines[1:]) + "\n"


def _cpu() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
