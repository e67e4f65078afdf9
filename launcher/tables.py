"""The launcher's tables: the plan before a run begins, and its progress."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from launcher.cluster import Cluster
from launcher.plan import stage_runs
from launcher.status import Status
from wemmu.config import Curriculum, ResolutionStep
from wemmu.config.checkpoints import CHECKPOINTS
from wemmu.planning.ask import PlanError
from wemmu.planning.plan import GPUS, Assumptions, Machine, Plan, plan
from wemmu.readable import duration, human


def console(stderr: bool = False) -> Console:
    """Return a console that takes brackets for what they are: a folder's name may contain them."""
    return Console(stderr=stderr, markup=False)


def plan_table(config: Curriculum, run_folder: Path, cluster: Cluster | None = None) -> Table:
    """Return a table with a column per stage or resolution; four fit into a narrow terminal."""
    table = Table(title=f"{config.name} in {run_folder}", box=box.HORIZONTALS, padding=(0, 1, 0, 0), show_lines=True)
    stages = [one.stage for one in stage_runs(config, run_folder)]
    for heading in ("", *(stage.label for stage in stages)):
        table.add_column(heading, overflow="fold")
    ranks = config.parallel.ranks
    batches = [config.memory.micro_batch_at(s.resolution, s.global_batch, ranks) for s in stages]
    table.add_row("resolution", *(f"{stage.resolution} px" for stage in stages))
    table.add_row("trains", *("\n".join(stage.trains) for stage in stages))
    table.add_row("objective", *(stage.objective.kind for stage in stages))
    table.add_row("mixture", *("\n".join(f"{share:g} {task}" for task, share in s.mixture.items()) for s in stages))
    if cluster is not None:
        nodes = cluster.nodes(ranks)
        table.add_row("nodes", *(f"{nodes} of {ranks // nodes}" for _ in stages))
    across = f" x {ranks}" if ranks > 1 else ""
    table.add_row("batch", *(f"{micro} x {accumulation}{across}" for micro, accumulation in batches))
    table.add_row("steps", *map(_steps, stages))
    table.add_row("start", *(_start(stage, run_folder) for stage in stages))
    if cluster is not None and cluster.gpu is not None:
        _costs(table, config, cluster.gpu)
    return table


def _costs(table: Table, config: Curriculum, gpu: str) -> None:
    machine = Machine.of(config, gpu)
    try:
        costs: Plan = plan(config, machine, Assumptions())
    except PlanError as error:
        table.caption, table.caption_justify = f"hours and memory are unknown: {error}", "left"
        return
    table.add_row(f"hours at {machine.mfu:.0%} MFU", *(f"{stage.hours:.1f}" for stage in costs.stages))
    room = GPUS[gpu].memory
    more = Text(f"\nmore than {human(room, 'B')}", "red")
    peaks = (Text(human(peak, "B")).append_text(more if peak > room else Text()) for peak in costs.peaks.values())
    table.add_row(f"memory per {gpu}", *peaks)
    table.add_row("checkpoint", *(human(stage.checkpoint, "B") for stage in costs.stages))


def _steps(stage: ResolutionStep) -> str:
    """Return the range of steps in which a resolution ends."""
    if not stage.resolutions:
        return str(stage.steps)
    begin, end = stage.span
    early = stage.has_plateau
    most, least = "at most " * early, "at most " * (early and begin > 0)
    return f"{least}{begin} to {end}" if stage.is_last else f"{least}{begin} to {most}{end}"


def _start(stage: ResolutionStep, run_folder: Path) -> str:
    start = stage.start
    if stage.resolutions and stage.resolution != stage.resolutions[0]:
        return f"{stage.resolutions[stage.resolutions.index(stage.resolution) - 1]} px"
    if start is None:
        return "backbones"
    if start.is_relative_to(run_folder):
        return "\n".join(part for part in start.relative_to(run_folder).parts if part != CHECKPOINTS)
    # Break at slashes; otherwise a narrow terminal breaks it anywhere.
    return str(start).replace("/", "/\n")


def status_table(rows: Sequence[Status], run_folder: Path) -> Table:
    """Return a table with a line per job; the footer names the logs."""
    table = Table(box=None, padding=(0, 1, 0, 0), caption=f"logs: wemmu logs {shlex.quote(str(run_folder))} JOB")
    table.add_column("job", no_wrap=True)
    for heading in ("state", "step", "loss", "samples/s", "left", "starts"):
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row.job,
            row.state,
            "" if row.steps is None else f"{row.step}/{row.steps}",
            "" if row.loss is None else f"{row.loss:.4f}",
            "" if row.samples_per_s is None else f"{row.samples_per_s:.0f}",
            "" if row.seconds_left is None else duration(row.seconds_left),
            str(row.attempts),
        )
    return table
