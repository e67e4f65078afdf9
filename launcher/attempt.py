"""One attempt at a job of a chain, from inside a Slurm job: `python -m launcher attempt JOB`.

The batch script starts this process and passes Slurm's warnings to it. It starts the ranks by `srun`, forwards the
warnings, records how the attempt ended, and requeues the job if another attempt can succeed.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher import folder, gate, slurm, step
from launcher.cluster import Cluster
from launcher.ending import CRASHES, crashes, ending
from launcher.job import Job, is_finished, last_step
from launcher.ledger import Event, Happening, Ledger
from launcher.lock import at_work
from launcher.plan import chain, find
from wemmu import batch_job
from wemmu.command_line import FAILED, FINAL, SAVED, Overrides, plainly
from wemmu.config import Curriculum, dump, load, load_curriculum
from wemmu.diagnosis.preflight import inputs

# Exit codes of ranks that a warning killed before their handlers were set, and of scripts that end on a warning.
BY_WARNING = (128 + signal.SIGUSR1, 128 + signal.SIGTERM)


# The curriculum of a script that is submitted by hand without another one.
DEFAULT = Path("configs/curriculum/paper.yaml")


class Attempt:
    """An attempt at `job` in the Slurm job `slurm_id`."""

    def __init__(self, run: Path, job: Job, cluster: Cluster | None, slurm_id: int) -> None:
        self.run, self.job, self.cluster, self.id = run, job, cluster, slurm_id
        self.ledger = Ledger(run / "ledger.jsonl")
        self.nodes = batch_job.node_names()
        self._warnings: list[int] = []
        self._requeued = False

    def make(self) -> int:
        """Run the attempt; return the exit code of the batch script. Does not return if the job is requeued."""
        job = self.job
        with at_work(self.run, job):
            self._close_lost()
            if is_finished(job):
                print(f"{job.name}: already finished", flush=True)
                return 0
            if job.gate and (closed := gate.reasons(job.gate)):
                print("\n".join([f"{job.name} cannot start:", *(f"  {why}" for why in closed)]), flush=True)
                self._note("refused", 0, reason=" ".join(closed), outcome="failed")
                return FINAL
            try:
                step.check_layout(job)
            except ValueError as error:
                self._note("refused", 0, reason=str(error), outcome="failed")
                raise
            if crashes(self.ledger.of(job.name)) >= CRASHES:
                return self._give_up()
            return self._run(1 + self.ledger.attempts(job.name), last_step(job))

    def _run(self, number: int, before: int | None) -> int:
        job = self.job
        for sent in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(sent, self._pass_on)
        step.record_environment(job)
        self._note("started", number, from_step=before)
        command = step.command(job, self.cluster)
        place = step.rendezvous(job, self.id, self.nodes)
        print(f"--- attempt {number} on {self.nodes}: {shlex.join(job.command)}", flush=True)
        # While this waits, warnings are forwarded.
        code = subprocess.run(command, env=os.environ | place | {"PYTHONUNBUFFERED": "1"}, check=False).returncode
        code = self.end(number, before, code)
        if self._requeued:
            # A script that ended now would be one that finished. Slurm ends this one.
            time.sleep(3600)
        return code

    def begin(self) -> bool:
        """Record the start of a job whose script is its own attempt; False if the job has crashed too often."""
        self._close_lost()
        if crashes(self.ledger.of(self.job.name)) >= CRASHES:
            self._give_up()
            return False
        self._note("started", 1 + self.ledger.attempts(self.job.name))
        return True

    def end(self, number: int, before: int | None, code: int, warnings: Sequence[int] = ()) -> int:
        """Record how the attempt ended, after `warnings`, and act on it."""
        job = self.job
        self._warnings += warnings
        ended, why = ending(job, code)
        if code != FINAL and is_finished(job):
            # A warning during the exit of a finished rank ends it by the signal.
            ended, why = "finished", "finished"
        elif ended == "crashed" and (self._preempted() or (self._warnings and code in BY_WARNING)):
            kept = "it goes back to its last checkpoint" if job.steps is not None else "what it has written stays"
            ended, why = "saved", f"was {self._cause()} before it could save; {kept}"
        elif ended == "saved":
            why = f"was {self._cause()} and saved its state"
        after = last_step(job)
        self._note("ended", number, exit_code=code, from_step=before, to_step=after, reason=why, outcome=ended)
        print(f"--- {job.name} {why}" + ("" if after is None else f", step {after} of {job.steps}"), flush=True)
        return self._afterwards(ended, number)

    def _afterwards(self, ended: str, number: int) -> int:
        if ended == "finished":
            return 0
        if ended == "failed":
            return FINAL
        if slurm.patiently(slurm.show, self.id).get("JobState") != "RUNNING":
            # Cancelled, by a person or by Slurm: do not requeue.
            return SAVED
        if crashes(self.ledger.of(self.job.name)) >= CRASHES:
            return self._give_up()
        self._note("requeued", number)
        sys.stdout.flush()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        slurm.patiently(slurm.requeue, self.id)
        self._requeued = True
        return SAVED

    def _give_up(self) -> int:
        why = f"{CRASHES} attempts in a row crashed without getting further"
        self._note("refused", self.ledger.attempts(self.job.name), reason=why, outcome="failed")
        print(f"--- {self.job.name} failed and is not requeued: {why}", flush=True)
        return 1

    def _pass_on(self, number: int, _: object) -> None:
        """Handle a warning that the job will end: SIGUSR1, which we request before the time limit, or SIGTERM."""
        first = not self._warnings
        self._warnings.append(number)
        # SIGKILL may follow before the ranks have ended; then only this line says why.
        self._note("warned", self.ledger.attempts(self.job.name), reason=signal.Signals(number).name)
        if first:
            try:
                slurm.signal_steps(self.id, "USR1")
            except slurm.SlurmError as error:
                # SIGTERM still reaches the ranks; otherwise they resume from the last checkpoint.
                print(f"--- could not send the warning signal to the ranks: {error}", flush=True)

    def _cause(self) -> str:
        if self._preempted():
            return "pre-empted"
        return "near its time limit" if signal.SIGUSR1 in self._warnings else "interrupted"

    def _preempted(self) -> bool:
        return slurm.patiently(slurm.show, self.id).get("PreemptTime", "None") not in ("None", "")

    def _close_lost(self) -> None:
        """Record the end of an earlier attempt that has none: its node failed, or Slurm killed all of it at once."""
        history = self.ledger.of(self.job.name)
        started = next((event for event in reversed(history) if event.event == "started"), None)
        if started is None:
            return
        since = [event.event for event in history if event.attempt == started.attempt]
        if "ended" in since:
            return
        warned = "warned" in since
        why = "was ended by Slurm" if warned else "was lost with its node, or killed together with its script"
        self.ledger.append(
            Event(
                self.job.name,
                started.attempt,
                "ended",
                from_step=started.from_step,
                to_step=last_step(self.job),
                reason=why,
                outcome="saved" if warned else "crashed",
                slurm=started.slurm,
                nodes=started.nodes,
            )
        )

    def _note(self, event: Happening, number: int, **more: Any) -> None:
        own: dict[str, Any] = {"slurm": self.id, "nodes": self.nodes, "host": socket.gethostname(), "pid": os.getpid()}
        self.ledger.append(Event(self.job.name, number, event, **own | more))


@plainly()
def attempt(
    name: Annotated[str, typer.Argument(metavar="JOB", help="Name of the job, as in `wemmu status`.")],
    overrides: Overrides = None,
) -> None:
    """Run one job of a chain inside a Slurm job. The scripts of slurm/ call it; slurm/job.sh lists the settings."""
    given = {key: Path(value) for key in ("RUN", "CURRICULUM", "CLUSTER") if (value := os.environ.get(key))}
    id = _own_id()
    config, run_folder = _resolve(given, overrides or ())
    job = find(chain(config, run_folder), name)
    site = run_folder / folder.CLUSTER
    cluster = load(site, Cluster) if site.exists() else None
    raise typer.Exit(Attempt(run_folder, job, cluster, id).make())


@plainly()
def note(
    name: Annotated[str, typer.Argument(metavar="JOB")],
    event: Annotated[str, typer.Argument(help="started or ended")],
    code: Annotated[int, typer.Argument(help="Exit code of a job that ended.")] = 0,
) -> None:
    """Begin or end the attempt of a script that is its own; RUN in the environment is the run folder.

    To end it may put the job back into the queue.
    """
    run_folder = folder.normalise(Path(os.environ["RUN"]))
    job = find(chain(folder.opened(run_folder), run_folder), name)
    made = Attempt(run_folder, job, None, _own_id())
    if event == "started":
        raise typer.Exit(0 if made.begin() else FAILED)
    warnings = [code - 128] if code in BY_WARNING else []
    raise typer.Exit(made.end(made.ledger.attempts(name), None, code, warnings))


def _own_id() -> int:
    if (id := batch_job.job_id()) is None:
        raise ValueError("this command runs only inside a Slurm job; outside, use `wemmu run CURRICULUM`")
    return int(id)


def _resolve(given: dict[str, Path], overrides: list[str] | tuple[()]) -> tuple[Curriculum, Path]:
    """Return the curriculum and its run folder, which is created if necessary."""
    there = given["RUN"] / folder.CURRICULUM if "RUN" in given else None
    new = there is None or not there.exists()
    source = given.get("CURRICULUM", DEFAULT) if new else there
    assert source is not None
    config = load_curriculum(source, overrides)
    run_folder = folder.normalise(given.get("RUN", Path("runs") / config.name))
    if not (run_folder / folder.CURRICULUM).exists() or overrides:
        folder.refuse_problems(config, inputs(config))
        folder.check(config, run_folder)
        run_folder.mkdir(parents=True, exist_ok=True)
        folder.write(config, run_folder)
    if "CLUSTER" in given:
        dump(load(given["CLUSTER"], Cluster), run_folder / folder.CLUSTER)
    return config, run_folder
