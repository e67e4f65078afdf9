"""Real jobs of a real Slurm: submit, wait, read what they printed. `.ci/slurm` tells what this Slurm is like."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.patience import eventually

# By this name the jobs of a test are found again and cancelled when it is over.
NAME = f"wemmu-test-{os.getpid()}"
FINAL = frozenset({"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"})
# A stage of a few steps on two busy cores.
PATIENCE_S = 900.0


def slurm(*command: str, stdin: str = "") -> str:
    """What a command of Slurm prints; the test fails if the command does."""
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{' '.join(command)} failed: {done.stderr}"
    return done.stdout


def submit(script: str | Path, folder: Path, *options: str, arguments: Sequence[str] = ()) -> int:
    """The id of a new job of one task, unless `options` of sbatch say otherwise.

    `script` is the text of a batch script, or the path of one that takes `arguments`. What the job prints goes into
    `folder`, one file for all of its starts.
    """
    command = ["sbatch", "--parsable", f"--job-name={NAME}", f"--output={folder}/%j.out", "--open-mode=append"]
    if isinstance(script, Path):
        return int(slurm(*command, *options, str(script), *arguments))
    return int(slurm(*command, *options, stdin=f"#!/usr/bin/env bash\n{script}"))


def record(job: int) -> dict[str, str]:
    """What Slurm knows of a job: JobState, Reason, Restarts, NodeList, ..."""
    return dict(re.findall(r"(\S+?)=(\S*)", slurm("scontrol", "--oneliner", "show", "job", str(job))))


def output(job: int) -> str:
    """What the job has printed so far."""
    file = Path(record(job)["StdOut"])
    return file.read_text() if file.exists() else ""


def wait_for(job: int, state: str, seconds: float = 90.0) -> None:
    """Wait until the job is in `state`; fail the test if it never is, at once if it ended otherwise."""

    def there() -> bool:
        now = record(job)["JobState"]
        assert now == state or now not in FINAL, f"job {job} is {now}, not {state}; it printed:\n{output(job)}"
        return now == state

    eventually(
        there,
        lambda: f"job {job} is {record(job)['JobState']}, not {state}; it printed:\n{output(job)}",
        seconds=seconds,
        every=0.1,
    )


def wait_for_output(job: int, text: str, seconds: float = 90.0) -> None:
    """Wait until the job has printed `text`; fail the test if it never does."""
    eventually(
        lambda: text in output(job),
        lambda: f"job {job} is {record(job)['JobState']} and has not printed {text!r}, but:\n{output(job)}",
        seconds=seconds,
        every=0.1,
    )


def start_again_soon(job: int) -> None:
    """Spare a job that was queued again most of the wait for its BeginTime.

    A start in the very second in which the nodes ended the last one fails ("Job credential revoked").
    """
    wait_for(job, "PENDING")
    slurm("scontrol", "update", f"JobId={job}", "StartTime=now+2")


def processes(job: int) -> dict[int, str]:
    """Process id -> command line of all on this machine that belong to the job, wherever their parents are."""
    found: dict[int, str] = {}
    mark = f"SLURM_JOB_ID={job}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (process / "environ").read_bytes().split(b"\0"):
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(process.name)] = command.decode(errors="replace")
        except OSError:
            continue
    return found
