"""What a part finds, row by row; how a part runs in a process of its own; the table and the verdict of all."""

import json
import os
import signal
import subprocess
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

# ok, off: within or beyond its bound. told: measured, without a bound. cannot: this machine or back end is unable to.
# left: there was no time. met, missed: a goal of speed or memory, which proves nothing wrong.
State = Literal["ok", "off", "told", "cannot", "left", "met", "missed"]
# Lines of a part's output that a failure shows, and characters of an error that a row shows.
TAIL, WORDS = 6, 300


@dataclass(frozen=True)
class Row:
    """name: of what was measured; found: its value, with its unit and its bound, for people; value: bare, if needed."""

    name: str
    found: str
    state: State = "told"
    value: float | None = None


@dataclass(frozen=True)
class Setting:
    """device: cpu or cuda; scratch: an empty folder of the part; steps: of the miniature's run; seconds: for the part;
    earlier: rows of a timed part from a call before.

    On a CPU the parts take the miniature's sizes where they take the published ones on a GPU.
    """

    device: str
    scratch: Path
    steps: int
    seconds: float
    earlier: tuple[Row, ...] = ()

    @property
    def real(self) -> bool:
        return self.device == "cuda"


@dataclass
class Result:
    """Of a part. ended: how its process ended, `done` if it said all it had to say."""

    part: str
    seconds: float = 0.0
    ended: str = "not run"
    rows: list[Row] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.ended != "done" or any(row.state == "off" for row in self.rows)

    @property
    def finished(self) -> bool:
        return not self.failed and all(row.state != "left" for row in self.rows)


def within(name: str, value: float, bound: float, place: str = "") -> Row:
    """A row about a distance that must not exceed `bound`; a NaN does."""
    found = f"{value:.1e} (at most {bound:.1e})" + (f", {place}" if place else "")
    return Row(name, found, "ok" if value <= bound else "off")


def met(reached: bool) -> State:
    return "met" if reached else "missed"


def tried(name: str, rows: Iterable[Row]) -> Iterator[Row]:
    """Yield the rows; if finding them fails, yield a row that says so, and the part goes on with what follows."""
    try:
        yield from rows
    except Exception as error:
        traceback.print_exc()
        yield Row(f"{name}: failed", f"{type(error).__name__}: {' '.join(str(error).split())[:WORDS]}", "off")


def write_row(file: Path, row: Row) -> None:
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps(asdict(row)) + "\n")


def read_rows(file: Path) -> list[Row]:
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    return [Row(**json.loads(line)) for line in text.splitlines()]


def run_part(part: str, command: Sequence[str], rows: Path, limit: float, beside: int = 1) -> Result:
    """Run a part's command, which writes rows into the file `rows`, for at most `limit` seconds.

    Whatever it started ends with it; what it had written counts, however it ended. beside: parts that run at a time.
    """
    log, begun = rows.with_suffix(".log"), time.monotonic()
    with log.open("wb") as output:
        # Asked through the driver's own library, whether there is a GPU, or no process could be forked afterwards.
        environment = os.environ | {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "TYPER_STANDARD_TRACEBACK": "1"}
        if beside > 1:
            # More threads than cores would spin, each waiting for others: tens of times slower.
            threads = str(max(1, len(os.sched_getaffinity(0)) // beside))
            environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"} | environment
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
        try:
            code = process.wait(limit)
            ended = "done" if code == 0 else f"ended with {code}: {tail(log)}"
        except subprocess.TimeoutExpired:
            ended = f"took more than {limit:.0f} s and was stopped"
        finally:
            end_group(process)
    return Result(part, time.monotonic() - begun, ended, read_rows(rows))


def end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill the process with all that it started in its own session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return " | ".join(line.strip() for line in lines[-TAIL:] if line.strip())


def table(about: dict[str, Any], results: Sequence[Result]) -> str:
    """Markdown: what ran where, and a table for each part."""
    lines = [
        f"`{about['command']}`: {about['where']}, torch {about['torch']}, commit {about['commit']}",
        "",
        verdict(results),
    ]
    for result in results:
        lines += ["", f"### {result.part}: {result.ended if result.failed else 'ok'}, {result.seconds:.0f} s", ""]
        if result.rows:
            lines += ["| what | found | |", "|---|---|---|"]
            lines += [
                f"| {row.name} | {row.found} | {'' if row.state == 'told' else row.state} |" for row in result.rows
            ]
    return "\n".join(lines) + "\n"


def load(out: Path, about: dict[str, Any]) -> list[Result]:
    """Return the results in `out` of an earlier call, if it ran the same code in the same place; else none."""
    file = out / "gpu.json"
    if not file.exists():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    if any(found.get(name) != value for name, value in about.items() if name not in ("command", "commit", "time")):
        return []
    parts = [{name: value for name, value in part.items() if name != "failed"} for part in found["parts"]]
    return [Result(**part | {"rows": [Row(**row) for row in part["rows"]]}) for part in parts]


def verdict(results: Sequence[Result]) -> str:
    failed = [result.part for result in results if result.failed]
    cannot = sum(row.state == "cannot" for result in results for row in result.rows)
    left = sum(row.state == "left" for result in results for row in result.rows)
    unable = f"; what cannot be run here: {cannot} rows" if cannot else ""
    unable += f"; {left} rows are left for the next call" if left else ""
    goals = [row for result in results for row in result.rows if row.state in ("met", "missed")]
    if goals:
        missed = [row.name for row in goals if row.state == "missed"]
        unable += f"; goals met: {len(goals) - len(missed)} of {len(goals)}"
        unable += f", missed: {'; '.join(missed)}" if missed else ""
    if failed:
        return f"**Verdict: not equal, or not finished: {', '.join(failed)}**{unable}."
    return f"**Verdict: within the bounds: {', '.join(result.part for result in results)}**{unable}."


def save(out: Path, about: dict[str, Any], results: Sequence[Result]) -> str:
    """Write gpu.json and gpu.md with what is known so far; return the Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    text = table(about, results)
    found = {**about, "parts": [asdict(result) | {"failed": result.failed} for result in results]}
    (out / "gpu.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (out / "gpu.md").write_text(text, encoding="utf-8")
    return text
