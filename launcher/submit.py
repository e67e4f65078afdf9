"""Submits a chain of jobs to Slurm, as the scripts of `slurm/` that wait for each other."""

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import slurm
from launcher.cluster import Cluster, JobResources
from launcher.folder import CURRICULUM
from launcher.job import Job, is_finished
from launcher.ledger import Event, Ledger
from launcher.plan import EVALUATION
from wemmu import batch_job
from wemmu.config.shipped import HOME

# Options of sbatch for GPUs or their memory; not for jobs without a GPU.
_OF_GPUS = re.compile(r"--(gres|gpu|mem|ntasks-per-gpu|cpus-per-gpu)")


@dataclass(frozen=True)
class Submission:
    """The arguments of sbatch, without the ids of the jobs that this one waits for."""

    job: Job
    options: tuple[str, ...]
    script: Path
    environment: dict[str, str]
    arguments: tuple[str, ...] = ()


def submissions(jobs: Sequence[Job], run: Path, cluster: Cluster) -> list[Submission]:
    """Return the unfinished jobs of a chain, in order.

    Raises:
        ValueError: if a training job does not fill the nodes of the cluster.
    """
    return [_submission(job, run, cluster) for job in jobs if not is_finished(job)]


def submit_all(chain: Sequence[Submission], ledger: Ledger) -> dict[str, int]:
    """Submit; return the id of each job. If one cannot be submitted, cancel the others.

    Raises:
        slurm.SlurmError: with sbatch's message.
    """
    ids: dict[str, int] = {}
    try:
        for one in chain:
            waits = [ids[name] for name in one.job.after if name in ids]
            dependency = [f"--dependency=afterok:{':'.join(map(str, waits))}"] if waits else []
            one.job.folder.mkdir(parents=True, exist_ok=True)
            options = [*one.options, *dependency]
            environment = batch_job.environment_outside() | one.environment
            ids[one.job.name] = slurm.submit(options, one.script, one.arguments, environment)
            ledger.append(Event(one.job.name, 0, "submitted", slurm=ids[one.job.name]))
    except BaseException:
        # Also after Ctrl-C or a full disk: no unknown job stays in the queue.
        slurm.cancel(ids.values())
        for name, id in ids.items():
            ledger.append(Event(name, 0, "cancelled", slurm=id, reason="the rest of the chain could not be submitted"))
        raise
    return ids


def as_typed(chain: Sequence[Submission], run: Path) -> str:
    """Return a script that submits the same jobs, each with the ids of its predecessors."""
    here, config = Path.cwd(), shlex.quote(str(run / CURRICULUM))
    lines = [
        "#!/usr/bin/env bash",
        "set -euo pipefail",
        f"cd {shlex.quote(str(here))}",
        f"[[ -e {config} ]] || {{ echo 'no {run / CURRICULUM}: `wemmu submit` writes it' >&2; exit 1; }}",
        "# The last line that is an id; a site may print more lines.",
        "id() { grep -oE '^[0-9]+(;|$)' | tail -n 1 | tr -d ';'; }",
        "",
    ]
    numbers: dict[str, int] = {}
    for one in chain:
        waits = [f"$job{numbers[name]}" for name in one.job.after if name in numbers]
        numbers[one.job.name] = number = len(numbers) + 1
        after = f", after {', '.join(one.job.after)}" if one.job.after else ""
        settings = [f"{name}={shlex.quote(value)}" for name, value in one.environment.items() if value]
        call = ["sbatch --parsable --export=ALL", *map(shlex.quote, one.options)]
        call += [f'"--dependency=afterok:{":".join(waits)}"'] if waits else []
        call += [shlex.quote(str(one.script)), *map(shlex.quote, one.arguments)]
        typed = " \\\n    ".join([" ".join(settings), *call])
        lines += [f"# {one.job.name}{after}", f"mkdir -p {shlex.quote(str(one.job.folder))}"]
        lines += [f"job{number}=$({typed} | id)", f'echo "{one.job.name}: $job{number}"', ""]
    return "\n".join(lines)


def live(ledger: Ledger) -> dict[str, slurm.Queued]:
    """Return the jobs of the run folder that are in Slurm's queue."""
    newest = latest_ids(ledger)
    queued = slurm.queue(newest.values())
    return {name: queued[id] for name, id in newest.items() if id in queued}


def latest_ids(ledger: Ledger) -> Mapping[str, int]:
    """Return the id of the newest Slurm job of each job."""
    return {e.job: e.slurm for e in ledger.events() if e.slurm is not None and e.event in ("submitted", "started")}


def _submission(job: Job, run: Path, cluster: Cluster) -> Submission:
    options = [
        f"--job-name={run.name}/{job.name}",
        f"--output={job.log.absolute()}",
        f"--comment=wemmu {run}",
        "--open-mode=append",
        "--requeue",
        # A job whose predecessor failed for good never runs, so Slurm cancels it.
        "--kill-on-invalid-dep=yes",
        *_site(cluster, job),
        *_resources(cluster, job),
        *(option for option in cluster.options if _gpus(cluster, job) or not _OF_GPUS.match(option)),
    ]
    arguments = (str(run / "curriculum.yaml"),) if job.name == "data" else ()
    return Submission(job, tuple(options), HOME / "slurm" / job.script, _environment(job, run, cluster), arguments)


def _environment(job: Job, run: Path, cluster: Cluster) -> dict[str, str]:
    """Return the variables that the scripts read."""
    own = {"PYTHON": sys.executable, "WEMMU_HOME": str(HOME), "RUN": str(run), "MODULES": " ".join(cluster.modules)}
    if cluster.prolog is not None:
        own["PROLOG"] = str(cluster.prolog)
    stage, _, benchmark = job.name.removesuffix(EVALUATION).partition("/")
    return own | {"STAGE": stage} | ({"BENCHMARK": benchmark} if benchmark else {})


def _site(cluster: Cluster, job: Job) -> list[str]:
    own = _kind(cluster, job) or JobResources()
    # QOS and constraint belong to a partition: a job in another partition uses its own or none.
    common = cluster if own.partition is None else JobResources()
    said = {
        "partition": own.partition or cluster.partition,
        "account": own.account or cluster.account,
        "qos": own.qos or common.qos,
        "constraint": own.constraint or common.constraint,
        "reservation": cluster.reservation if own.partition is None else None,
        "mail-user": cluster.mail_user,
        "mail-type": ",".join(cluster.mail_type) if cluster.mail_user else None,
    }
    return [f"--{name}={value}" for name, value in said.items() if value is not None]


def _resources(cluster: Cluster, job: Job) -> list[str]:
    kind = _kind(cluster, job)
    nodes = kind.nodes if kind else cluster.nodes(job.ranks)
    gpus = _gpus(cluster, job)
    cpus = kind.cpus if kind else cluster.cpus_per_node
    memory = kind.memory if kind else cluster.memory
    time = kind.time if kind else cluster.times.get(job.folder.name, cluster.time)
    options = [f"--nodes={nodes}", "--ntasks-per-node=1", f"--time={time}"]
    # Override the scripts' default if there are no GPUs.
    options += [f"--gres={(kind and kind.gres) or cluster.gres}:{gpus}" if gpus else "--gres=none"]
    options += [f"--cpus-per-task={cpus}"] if cpus else []
    options += [f"--mem={memory}"] if memory else []
    # These jobs resume after a requeue.
    if kind is None or job.name == "data":
        options += [f"--signal=B:USR1@{cluster.warn_before}"]
    if kind is None:
        # The scripts' default is exclusive.
        options += ["--exclusive" if cluster.exclusive else "--oversubscribe"]
    return options


def _gpus(cluster: Cluster, job: Job) -> int:
    """GPUs of each node of a job."""
    if not cluster.gpus:
        return 0
    kind = _kind(cluster, job)
    if kind is None:
        return job.ranks // cluster.nodes(job.ranks)
    # Each rank of a benchmark has a GPU, too.
    return max(kind.gpus, job.ranks) if kind.gpus and job.evaluates else kind.gpus


def _kind(cluster: Cluster, job: Job) -> JobResources | None:
    """Return the resources of a job that does not train."""
    if job.steps is not None:
        return None
    if job.name == "data":
        return cluster.data
    return cluster.evaluation if job.evaluates else cluster.export
