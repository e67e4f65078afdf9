"""Correct and fast on this GPU? One command, under ten minutes, on one GPU, without a network.

    python -m benchmarks.gpu                         # all parts; writes benchmarks/results/gpu.{json,md}
    python -m benchmarks.gpu --only parity,kernels
    python -m benchmarks.gpu --device cpu            # the same code at the miniature's sizes

Each part is a process of its own with a limit, so one that fails takes no other with it, and the results are written
as each ends. Parts that time nothing run side by side. The same command again goes on: with the same code on the same
device it keeps what is finished and within its bounds, unless `--only` names it. Exit code 0: all within their bounds;
1: something is not, or did not finish; 78: there is no GPU.
"""

import os
import shlex
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from benchmarks.gpu import verdict
from benchmarks.gpu.verdict import Result, Setting
from benchmarks.measure import RESULTS, ROOT, Out
from wemmu.command_line import FAILED, FINAL, USAGE, fail
from wemmu.readable import valid
from wemmu.revision import revision


class Part(NamedTuple):
    """function: of a module of this package, from a Setting to rows, as it finds them. limit: seconds.

    timed: takes times, so it runs alone, and goes on from the rows of an earlier call.
    """

    help: str
    module: str
    function: str
    limit: float
    timed: bool = False


# Seconds until a part begins.
IMPORTS = 20
# The longest of those side by side and the limits of the timed ones are less than ten minutes.
PARTS = {
    "parity": Part("losses and gradients of each recipe against the CPU's", "engines", "parity", 220),
    "kernels": Part("each fused kernel and each compiled layer against the plain one", "kernels", "kernels", 220),
    "zero3": Part("ZeRO-3 on one rank against the engine single", "engines", "zero3", 220),
    "hybrid": Part("tensor layers and the pipeline, on two processes that share the GPU", "engines", "hybrid", 220),
    "miniature": Part("a run of the launcher, killed and resumed; export and samples", "miniature", "miniature", 290),
    "sampling": Part("seconds for an image and memory, by steps of the solver", "step", "sampling", 60, timed=True),
    # The last one: it has the time that is left, and says what it leaves out.
    "step": Part("time, memory and MFU of a step, ours and the naive one", "step", "steps", 540, timed=True),
}


def main(
    only: Annotated[str, typer.Option(metavar="PART,PART", help="these parts alone; see --list")] = "",
    list_: Annotated[bool, typer.Option("--list", help="name the parts and stop")] = False,
    device: Annotated[str, typer.Option(help="cuda; or cpu, to see that the code runs, at small sizes")] = "cuda",
    steps: Annotated[int, typer.Option(min=4, help="training steps of the part miniature")] = 200,
    minutes: Annotated[float, typer.Option(help="for all parts; what is left is for the next call")] = 9.3,
    one: Annotated[str, typer.Option(hidden=True)] = "",
    rows: Annotated[Path | None, typer.Option(hidden=True)] = None,
    seconds: Annotated[float, typer.Option(hidden=True)] = 0.0,
    out: Out = RESULTS,
) -> None:
    if list_:
        print("\n".join(f"{name:10} {part.help}" for name, part in PARTS.items()))
        return
    names = only.split(",") if only else list(PARTS)
    if wrong := [name for name in [*names, *([one] if one else [])] if name not in PARTS]:
        fail(f"--only {only or one}: there is no part {wrong[0]!r}; {valid(wrong, PARTS)}", USAGE)
    if device not in ("cpu", "cuda"):
        fail(f"--device {device} is unknown; valid: cuda, cpu", USAGE)
    about = _about(device) | {"steps": steps}
    if one:
        assert rows is not None, "the parent says where rows go"
        _play(one, Setting(device, Path(), steps, seconds, tuple(verdict.read_rows(rows))), rows)
        return
    earlier = verdict.load(out, about)
    kept = [result for result in earlier if result.finished and not (only and result.part in names)]
    results = kept + [
        Result(name, ended="not run yet", rows=[row for each in earlier if each.part == name for row in each.rows])
        for name in PARTS
        if name in names and name not in {result.part for result in kept}
    ]
    results.sort(key=lambda result: list(PARTS).index(result.part))
    _run(results, ["--device", device, "--steps", str(steps)], minutes, out, about)
    print("\n" + verdict.table(about, results))
    raise typer.Exit(FAILED if any(result.failed for result in results) else 0)


def _play(name: str, setting: Setting, rows: Path) -> None:
    """In the process of a part."""
    function = getattr(import_module(f"benchmarks.gpu.{PARTS[name].module}"), PARTS[name].function)
    with tempfile.TemporaryDirectory() as scratch:
        for row in function(replace(setting, scratch=Path(scratch))):
            print(row, flush=True)
            verdict.write_row(rows, row)


def _run(results: list[Result], options: list[str], minutes: float, out: Path, about: dict[str, Any]) -> None:
    """Run the parts that are not finished, and write what is known after each: side by side, then the timed ones."""
    until = time.monotonic() + 60 * minutes
    os.chdir(ROOT)
    missing = [result for result in results if not result.finished]
    groups = [[one for one in missing if not PARTS[one.part].timed]]
    groups += [[one] for one in missing if PARTS[one.part].timed]

    def run(result: Result, folder: str, beside: int) -> Result:
        name, file = result.part, Path(folder) / f"{result.part}.jsonl"
        limit = min(PARTS[name].limit if "cuda" in options else 60 * minutes, until - time.monotonic())
        if limit <= 0:
            return replace(result, ended="not run: the time is up")
        for row in result.rows if PARTS[name].timed else ():
            if row.state not in ("left", "off"):
                verdict.write_row(file, row)
        command = [sys.executable, "-m", "benchmarks.gpu", "--one", name, "--rows", str(file), *options]
        # Its imports take a part of it.
        return verdict.run_part(name, [*command, "--seconds", str(limit - IMPORTS)], file, limit, beside)

    with tempfile.TemporaryDirectory() as folder:
        for group in filter(None, groups):
            with ThreadPoolExecutor(len(group)) as pool:
                for future in as_completed([pool.submit(run, each, folder, len(group)) for each in group]):
                    result = future.result()
                    results[[one.part for one in results].index(result.part)] = result
                    print(
                        f"{result.part}: {result.ended if result.failed else 'ok'}, {result.seconds:.0f} s", flush=True
                    )
                    verdict.save(out, about, results)


def _about(device: str) -> dict[str, Any]:
    """The command and where it runs. Ends the process if there is no GPU and one is meant."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        fail(
            "torch sees no GPU here; `--device cpu` runs the same code at small sizes, which says nothing of a GPU",
            FINAL,
        )
    found, libraries = revision(), {name: _version(name) for name in ("transformers", "diffusers", "deepspeed")}
    cores = len(os.sched_getaffinity(0))
    return {
        "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
        "where": f"{torch.cuda.get_device_name()}, {cores} cores" if device == "cuda" else f"CPU, {cores} cores",
        "torch": torch.__version__,
        "libraries": libraries,
        "python": sys.version.split()[0],
        "commit": "unknown" if found is None else found.commit[:12] + (", with changes" if found.dirty else ""),
        "code": _code(),
        "time": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
    }


def _code() -> str:
    """A hash of the code: a machine with a GPU may have neither git nor the history."""
    files = sorted(
        file for folder in ("wemmu", "benchmarks", "launcher", "tests") for file in (ROOT / folder).rglob("*.py")
    )
    return sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed as a package"


if __name__ == "__main__":
    typer.run(main)
