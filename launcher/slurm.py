"""The few commands of Slurm that the launcher needs, as functions. Arguments never pass through a shell.

A site may have no accounting data base, so nothing calls `sacct`: the ledger knows what Slurm has forgotten.
"""

import os
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from launcher.cluster import Container

# Seconds until a silent controller is an error.
_PATIENCE = 60.0
# Seconds that a job waits for the controller to come back.
_OUTAGE = 1800.0
# Seconds until the other nodes are killed after the first one has ended.
_STRAGGLERS_S = 120
# Slurm's messages for an unreachable controller.
_SILENT = re.compile(
    r"Unable to contact|Connection (refused|timed out)|Socket timed out|Zero Bytes were transmitted", re.I
)
# States in which a job may still run, or run again.
_LIVE = re.compile(
    "PENDING|CONFIGURING|RUNNING|COMPLETING|SUSPENDED|REQUEUED|RESIZING|STOPPED|SIGNALING|STAGE_OUT|REQUEUE_HOLD|"
    "REQUEUE_FED|SPECIAL_EXIT|RESV_DEL_HOLD"
)
# sbatch's line with the id: `ID` or, in a federation, `ID;CLUSTER`. A wrapper may ignore --parsable.
_ID = re.compile(r"^(?:Submitted batch job )?(\d+)(?:;\S+| on cluster \S+)?\s*$", re.M)
# Their message on a machine that belongs to no cluster.
_ABSENT = re.compile(r"Could not establish a configuration source", re.I)


class SlurmError(RuntimeError):
    """A command of Slurm failed; the message holds the command and its output."""

    exit_code = 1


class AbsentError(SlurmError):
    """This machine has no Slurm."""


class SilentError(SlurmError):
    """The controller did not answer."""


def _say(state: RetryCallState) -> None:
    assert state.outcome is not None
    assert state.next_action is not None
    print(f"--- {state.outcome.exception()}; again in {state.next_action.sleep:.0f} s", flush=True)


# Repeats a call while the controller is silent: running jobs outlive its restart.
patiently = Retrying(
    retry=retry_if_exception_type(SilentError),
    stop=stop_after_delay(_OUTAGE),
    wait=wait_exponential(max=60),
    before_sleep=_say,
    reraise=True,
)


@dataclass(frozen=True)
class Queued:
    """A job in the queue. reason: why it waits. nodes: where it runs."""

    id: int
    state: str
    reason: str
    nodes: str


def submit(options: Sequence[str], script: Path, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Submit a batch script with the whole `environment`; return the id of the job."""
    # A site may have another default.
    command = ["sbatch", "--parsable", "--export=ALL", *options, str(script), *arguments]
    answer = _call(command, environment)
    # Sites print banners; the answer comes last.
    if not (ids := _ID.findall(answer)):
        raise SlurmError(
            f"sbatch ended well but printed no job id; `squeue --me` shows whether a job is queued. "
            f"It printed: {answer}"
        )
    return int(ids[-1])


def queue(ids: Iterable[int]) -> dict[int, Queued]:
    """Return those of the jobs that are queued or running."""
    numbers = sorted(set(ids))
    if not numbers:
        return {}
    # By id, not by user: a colleague may ask. squeue fails on a single unknown id, but not on one of several.
    try:
        lines = _call(["squeue", f"--jobs={','.join(map(str, numbers))}", "--noheader", "--format=%i|%T|%r|%N"])
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    jobs = [line.split("|") for line in lines.splitlines()]
    # Banners have other columns.
    known = [job for job in jobs if len(job) == 4 and job[0].isdigit()]
    found = {int(id): Queued(int(id), state, why, nodes) for id, state, why, nodes in known}
    return {id: found[id] for id in numbers if id in found and _LIVE.fullmatch(found[id].state)}


def show(id: int) -> dict[str, str]:
    """Return the controller's fields of a job, as JobState, Restarts, PreemptTime; empty if it has forgotten it."""
    try:
        return dict(re.findall(r"(\S+?)=(\S*)", _call(["scontrol", "--oneliner", "show", "job", str(id)])))
    except SlurmError as error:
        if "Invalid job id" in str(error):
            return {}
        raise


def requeue(id: int) -> None:
    """Requeue a running job under its id; this ends the caller if it is part of the job."""
    _call(["scontrol", "requeue", str(id)])


def signal_steps(id: int, name: str) -> None:
    """Send a signal to every process of the job's steps, but not to its script."""
    _call(["scancel", f"--signal={name}", str(id)])


def cancel(ids: Iterable[int]) -> None:
    """Cancel jobs; skip those that have ended."""
    if numbers := [str(id) for id in ids]:
        _call(["scancel", "--quiet", *numbers])


def on_nodes(nodes: int, container: Container | None) -> list[str]:
    """Return the `srun` of a command that starts once on each of the first `nodes` nodes of this job."""
    srun = ["srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--export=ALL"]
    srun += [f"--wait={_STRAGGLERS_S}", "--kill-on-bad-exit=0", "--unbuffered"]
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        srun.append(f"--cpus-per-task={cpus}")
    if container is None:
        return srun
    # Paths of a run are relative to the launcher's working directory.
    here, mounts = Path.cwd(), list(container.mounts)
    if not any(here.is_relative_to((mount.split(":") * 2)[1]) for mount in mounts):
        mounts.append(f"{here}:{here}")
    in_container = {"image": container.image, "mounts": ",".join(mounts), "workdir": here}
    return srun + [f"--container-{name}={value}" for name, value in in_container.items()]


def address(node: str) -> str:
    """Return the address by which the other nodes reach `node`."""
    found = re.search(r"NodeAddr=(\S+)", _call(["scontrol", "--oneliner", "show", "node", node]))
    if found is None:
        raise SlurmError(f"scontrol shows no address of node {node}")
    return found[1]


def _call(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            check=False,
            timeout=_PATIENCE,
        )
    except FileNotFoundError as error:
        raise AbsentError(f"{command[0]} is not installed here; are you on a machine of the cluster?") from error
    except subprocess.TimeoutExpired as error:
        raise SilentError(f"{command[0]} has not answered for {_PATIENCE:g} s; is the controller up?") from error
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        kind = AbsentError if _ABSENT.search(said) else SilentError if _SILENT.search(said) else SlurmError
        raise kind(f"{' '.join(command[:4])} failed: {said}")
    return done.stdout
