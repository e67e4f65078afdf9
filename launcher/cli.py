"""The command line of the launcher."""

import json
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.live import Live
from rich.table import Table

from launcher import folder, local, slurm
from launcher.attempt import attempt, note
from launcher.cluster import Cluster
from launcher.job import Job
from launcher.ledger import Event, Ledger
from launcher.lock import SUBMISSION, locked
from launcher.plan import chain, find
from launcher.status import Status, statuses
from launcher.submit import as_typed, latest_ids, live, submissions, submit_all
from launcher.tables import console, plan_table, status_table
from wemmu.command_line import (
    FAILED,
    AsJson,
    CurriculumFile,
    DryRun,
    Into,
    NewestRun,
    Overrides,
    RunFolder,
    UsageError,
    fail,
    plainly,
    program,
)
from wemmu.config import Curriculum, dump, load, load_curriculum
from wemmu.config.files import replace_text
from wemmu.diagnosis.findings import Call
from wemmu.diagnosis.preflight import calls, planned_memory
from wemmu.locks import LockedError

ClusterFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Cluster file (docs/cluster.md); default: the run folder's."),
]


@plainly()
def run(curriculum: CurriculumFile, into: Into = None, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """Run a curriculum on this machine. The same command resumes it."""
    _run_here(load_curriculum(curriculum, overrides or ()), into, dry_run)


@plainly()
def submit(
    curriculum: CurriculumFile,
    cluster: ClusterFile = None,
    into: Into = None,
    overrides: Overrides = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Submit a curriculum to Slurm, as jobs that wait for each other. Skips finished jobs of the run folder."""
    if dry_run and as_json:
        raise UsageError("--json prints the Slurm ids of submitted jobs, and --dry-run submits none; leave out one")
    config = load_curriculum(curriculum, overrides or ())
    run_folder = folder.normalise(into or Path("runs") / config.name)
    site = _cluster(run_folder, cluster)
    if dry_run:
        console().print(plan_table(config, run_folder, site))
        print(as_typed(submissions(chain(config, run_folder), run_folder, site), run_folder))
    _check(config, run_folder, site)
    if not dry_run:
        _submit(config, run_folder, site, as_json)


@plainly()
def resume(
    run_folder: RunFolder,
    overrides: Overrides = None,
    here: Annotated[
        bool, typer.Option("--here", help="Resume on this machine, even if the run was submitted to Slurm.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Resume the unfinished jobs of a run, where it ran before: on this machine or on Slurm."""
    run_folder = folder.normalise(run_folder)
    config = folder.opened(run_folder, overrides or ())
    if here or not (run_folder / folder.CLUSTER).exists():
        if as_json:
            raise UsageError(f"--json prints Slurm ids, and {run_folder} continues on this machine; leave it out")
        _run_here(config, run_folder)
        return
    try:
        site = _cluster(run_folder, None)
        _check(config, run_folder, site)
        _submit(config, run_folder, site, as_json)
    except slurm.AbsentError as error:
        raise UsageError(
            f"{error} {run_folder} was submitted to Slurm; add --here to continue on this machine"
        ) from error


@plainly()
def status(
    run_folder: NewestRun = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh every few seconds until Ctrl-C.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the progress of each job of a run."""
    if watch and as_json:
        raise UsageError("--watch shows a table that changes, --json prints the state once; leave out one")
    run_folder = run_folder or folder.newest()
    config = folder.opened(run_folder)
    if as_json:
        print(json.dumps([asdict(row) for row in _statuses(config, run_folder)], indent=1))
        return
    if not watch:
        console().print(_status(config, run_folder))
        return
    with suppress(KeyboardInterrupt), Live(_status(config, run_folder), console=console(), auto_refresh=False) as shown:
        while True:
            time.sleep(5)
            shown.update(_status(config, run_folder), refresh=True)


@plainly()
def cancel(run_folder: RunFolder) -> None:
    """Cancel the Slurm jobs of a run. Training jobs save first; `wemmu resume` continues the run."""
    folder.curriculum_file(run_folder)
    ledger = Ledger(run_folder / "ledger.jsonl")
    jobs = live(ledger)
    # Record it first: the cancelled job reads it.
    for name, queued in jobs.items():
        ledger.append(Event(name, 0, "cancelled", slurm=queued.id, reason="by `wemmu cancel`"))
    # From the end, so that no job starts because its predecessor is gone.
    slurm.cancel([queued.id for queued in reversed(list(jobs.values()))])
    print(
        "\n".join(f"cancelled {name} (job {queued.id})" for name, queued in jobs.items())
        or "no job of this run is queued"
    )


@plainly()
def logs(
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[RUN] [JOB]",
            help="Run folder, default: the newest under runs/; job as in `wemmu status`, default: the newest log.",
        ),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow the log until Ctrl-C.")] = False,
) -> None:
    """Show the log of a job."""
    run_folder, name = _run_and_job(words or [])
    jobs = chain(folder.opened(run_folder), run_folder)
    try:
        job = find(jobs, name) if name else _wrote_last(jobs, run_folder)
    except ValueError as error:
        if words and len(words) == 1 and Path(words[0]).exists():
            folder.curriculum_file(Path(words[0]))
        raise ValueError(f"{run_folder}: {error}") from error
    if not job.log.exists():
        fail(f"{job.name} has not started: {job.log} does not exist", FAILED)
    with job.log.open(errors="replace", encoding="utf-8") as log, suppress(KeyboardInterrupt):
        while True:
            print(log.read(), end="", flush=True)
            if not follow:
                return
            time.sleep(0.5)


app = program(
    run,
    submit,
    status,
    logs,
    cancel,
    resume,
    attempt,
    help="Runs a curriculum as a chain of jobs: data, each stage and its evaluation, export, report.",
)
app.command(hidden=True)(note)


def _run_here(config: Curriculum, into: Path | None, dry_run: bool = False) -> None:
    run_folder = folder.normalise(into or Path("runs") / config.name)
    jobs = chain(config, run_folder)
    console().print(plan_table(config, run_folder))
    _check(config, run_folder)
    if dry_run:
        return
    ledger = Ledger(run_folder / "ledger.jsonl")
    # A job that runs holds the lock as well, but knows less to say.
    _refuse_if_live_here(ledger, run_folder)
    with locked(run_folder) as lock:
        # Again, for another launcher may have come between.
        folder.check(config, run_folder)
        _refuse_if_live_here(ledger, run_folder)
        folder.write(config, run_folder)
        code = local.run(jobs, ledger, lock)
    if code:
        fail(f"{run_folder} is not finished. To resume: wemmu resume {shlex.quote(str(run_folder))}", code)
    print("\nfinished:", *(f"  {product}" for job in jobs[-2:] for product in job.products), sep="\n")
    model = run_folder / "export" if config.recipe.draws else run_folder
    print(f"try it in a browser:\n  wemmu ui {shlex.quote(str(model))}")


def _cluster(run_folder: Path, file: Path | None) -> Cluster:
    own = run_folder / folder.CLUSTER
    if file is None and not own.exists():
        raise UsageError(
            "submit needs a cluster file: --cluster FILE; copy cluster/example.yaml, whose folder `wemmu config list` "
            "names (docs/cluster.md)"
        )
    return load(file or own, Cluster)


def _check(config: Curriculum, run_folder: Path, site: Cluster | None = None) -> None:
    """Check everything that would fail later, report all of it at once, and warn of probable failures."""
    gpu = site.gpu if site and site.gpus else None
    memory: list[Call] = [(planned_memory, config, gpu)] if gpu else []
    # First: it takes no time, while some of the others measure the model.
    folder.check(config, run_folder)
    folder.refuse_problems(config, [*memory, *calls(config, run_folder)])


def _submit(config: Curriculum, run_folder: Path, cluster: Cluster, as_json: bool = False) -> None:
    ledger = Ledger(run_folder / "ledger.jsonl")
    _refuse_if_live(ledger, run_folder)
    with locked(run_folder, 0, SUBMISSION):
        with locked(run_folder, 0):
            _refuse_if_live(ledger, run_folder)
            folder.check(config, run_folder)
            todo = submissions(chain(config, run_folder), run_folder, cluster)
            console(as_json).print(plan_table(config, run_folder, cluster))
            folder.write(config, run_folder)
            dump(cluster, run_folder / folder.CLUSTER)
            replace_text(run_folder / "submitted.sh", as_typed(todo, run_folder))
        # The first job may start before the last is submitted, and needs the lock of launchers that run jobs.
        ids = submit_all(todo, ledger)
    if as_json:
        print(json.dumps(ids))
        return
    print("\n".join(f"submitted {name} as job {id}" for name, id in ids.items()) or "all jobs are finished")
    print(f"progress: wemmu status {shlex.quote(str(run_folder))}")


def _refuse_if_live(ledger: Ledger, run_folder: Path) -> None:
    if jobs := live(ledger):
        queue = ", ".join(f"{name} (job {queued.id})" for name, queued in jobs.items())
        cancel = f"wemmu cancel {shlex.quote(str(run_folder))}"
        raise LockedError(f"{run_folder} has jobs in Slurm: {queue}. Wait, or `{cancel}` first")


def _refuse_if_live_here(ledger: Ledger, run_folder: Path) -> None:
    """The same where there may be no Slurm: a folder can move from a cluster to a machine without one."""
    try:
        _refuse_if_live(ledger, run_folder)
    except slurm.AbsentError:
        names = ", ".join(latest_ids(ledger))
        sentence = f"warning: without Slurm here, the launcher cannot check for queued jobs of {run_folder} ({names})"
        typer.echo(f"{sentence}; it continues. The folder's lock still excludes jobs on this file system", err=True)


def _run_and_job(words: list[str]) -> tuple[Path, str | None]:
    """One word is a run folder if there is one of that name, else a job."""
    if len(words) > 2:
        raise UsageError(f"logs takes a run folder and a job, got {len(words)} words: {' '.join(words)}")
    if len(words) == 2 or (words and (Path(words[0]) / folder.CURRICULUM).exists()):
        return Path(words[0]), words[1] if len(words) == 2 else None
    return folder.newest(), words[0] if words else None


def _wrote_last(jobs: Sequence[Job], run_folder: Path) -> Job:
    started = [job for job in jobs if job.log.exists()]
    if not started:
        raise ValueError("no job has started")
    return max(started, key=lambda job: job.log.stat().st_mtime_ns)


def _status(config: Curriculum, run_folder: Path) -> Table:
    return status_table(_statuses(config, run_folder), run_folder)


def _statuses(config: Curriculum, run_folder: Path) -> list[Status]:
    ledger = Ledger(run_folder / "ledger.jsonl")
    queued = None
    if latest_ids(ledger):
        try:
            queued = live(ledger)
        except slurm.SlurmError as error:
            console(stderr=True).print(f"the state in Slurm is unknown: {error}")
    return statuses(chain(config, run_folder), ledger, queued)
