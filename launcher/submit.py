"""A chain of jobs -> Slurm jobs that wait for each other. What is submitted are the scripts of `slurm/`."""

import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import slurm
from launcher.cluster import Cluster, Kind
from launcher.job import Job, is_finished
from launcher.ledger import Event, Ledger
from launcher.plan import EVALUATION, HOME


@dataclass(frozen=True)
class Submission:
    """What sbatch is called with, but for the ids of the jobs that this one waits for."""

    job: Job
    options: tuple[str, ...]
    script: Path
    environment: dict[str, str]
    arguments: tuple[str, ...] = ()


def submissions(jobs: Sequence[Job], run: Path, cluster: Cluster) -> list[Submission]:
    """What is left to do of a chain, in its order.

    Raises:
        ValueError: if a training job does not fill the nodes of the cluster.
    """
    return [_submission(job, run, cluster) for job in jobs if not is_finished(job)]


def submit_all(chain: Sequence[Submission], ledger: Ledger) -> dict[str, int]:
    """Submit; returns the id of each job. If one cannot be submitted, those that were are cancelled again.

    Raises:
        slurm.SlurmError: with what sbatch said.
    """
    ids: dict[str, int] = {}
    try:
        for one in chain:
            waits = [ids[name] for name in one.job.after if name in ids]
            dependency = [f"--dependency=afterok:{':'.join(map(str, waits))}"] if waits else []
            one.job.folder.mkdir(parents=True, exist_ok=True)
            ids[one.job.name] = slurm.submit(
                [*one.options, *dependency], one.script, one.arguments, _inherited() | one.environment
            )
            ledger.append(Event(one.job.name, 0, "submitted", slurm=ids[one.job.name]))
    except slurm.SlurmError:
        slurm.cancel(ids.values())
        for name, id in ids.items():
            ledger.append(Event(name, 0, "cancelled", slurm=id, reason="the rest of the chain could not be submitted"))
        raise
    return ids


def as_typed(chain: Sequence[Submission]) -> str:
    """What a person would type to submit the same: for reading, the ids of the jobs waited for are not known yet."""
    lines: list[str] = []
    for one in chain:
        after = f", after {', '.join(one.job.after)}" if one.job.after else ""
        settings = [f"{name}={shlex.quote(value)}" for name, value in one.environment.items() if value]
        call = ["sbatch", *map(shlex.quote, one.options), str(one.script), *map(shlex.quote, one.arguments)]
        lines += [f"# {one.job.name}{after}", " \\\n    ".join([" ".join(settings), *call]), ""]
    return "\n".join(lines)


def _inherited() -> dict[str, str]:
    # What describes a job that submits another must not reach that one.
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}


def live(ledger: Ledger) -> dict[str, slurm.Queued]:
    """Jobs of the run folder that Slurm has in its queue."""
    newest = latest_ids(ledger)
    queued = slurm.queue(newest.values())
    return {name: queued[id] for name, id in newest.items() if id in queued}


def latest_ids(ledger: Ledger) -> Mapping[str, int]:
    """Job -> id of its newest Slurm job."""
    return {e.job: e.slurm for e in ledger.events() if e.slurm is not None and e.event in ("submitted", "started")}


def _submission(job: Job, run: Path, cluster: Cluster) -> Submission:
    options = [
        f"--job-name={run.name}/{job.name}",
        f"--output={job.log.absolute()}",
        f"--comment=wemmu {run}",
        "--open-mode=append",
        "--requeue",
        # A job whose predecessor failed for good will never run; so it shall not wait.
        "--kill-on-invalid-dep=yes",
        *_site(cluster, job),
        *_resources(cluster, job),
        *cluster.options,
    ]
    arguments = (str(run / "curriculum.yaml"),) if job.name == "data" else ()
    return Submission(job, tuple(options), HOME / "slurm" / job.script, _environment(job, run, cluster), arguments)


def _environment(job: Job, run: Path, cluster: Cluster) -> dict[str, str]:
    """What the scripts read, beside the arguments."""
    own = {"PYTHON": sys.executable, "WEMMU_HOME": str(HOME), "RUN": str(run), "MODULES": " ".join(cluster.modules)}
    if cluster.prolog is not None:
        own["PROLOG"] = str(cluster.prolog)
    return own | {"STAGE": job.name.removesuffix(EVALUATION)}


def _site(cluster: Cluster, job: Job) -> list[str]:
    said = {"account": cluster.account, "qos": cluster.qos, "constraint": cluster.constraint}
    partition = (kind.partition if (kind := _kind(cluster, job)) else None) or cluster.partition
    return [f"--{name}={value}" for name, value in ({"partition": partition} | said).items() if value is not None]


def _resources(cluster: Cluster, job: Job) -> list[str]:
    kind = _kind(cluster, job)
    nodes = kind.nodes if kind else cluster.nodes(job.ranks)
    ranks = job.ranks // nodes if kind is None else 0
    gpus = (kind.gpus if kind else ranks) if cluster.gpus else 0
    cpus = kind.cpus if kind else cluster.cpus_per_node
    options = [f"--nodes={nodes}", "--ntasks-per-node=1", f"--time={kind.time if kind else cluster.time}"]
    # The scripts' own default must not stand where there are none.
    options += [f"--gres=gpu:{gpus}" if gpus else "--gres=none"]
    options += [f"--cpus-per-task={cpus}"] if cpus else []
    if kind is None:
        options += [f"--signal=B:USR1@{cluster.warn_before}"]
        options += ["--exclusive"] if cluster.exclusive else []
    return options


def _kind(cluster: Cluster, job: Job) -> Kind | None:
    """Resources of a job that is no training."""
    if job.steps is not None:
        return None
    if job.name == "data":
        return cluster.data
    return cluster.evaluation if job.script == "evaluate.sh" else cluster.export
