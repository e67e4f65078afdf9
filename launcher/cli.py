"""The command line of the launcher."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from launcher import folder, local
from launcher.ledger import Ledger
from launcher.lock import LockedError, locked
from launcher.plan import chain, stage_runs
from launcher.status import Status, statuses
from wemmu.config import Curriculum, load_curriculum

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def _about() -> None:
    """Runs a curriculum as a chain of jobs: data, each stage and its evaluation, export, report."""


@app.command()
def run(
    curriculum: Annotated[Path, typer.Argument(help="Curriculum in YAML; configs/ holds examples.")],
    out: Annotated[Path | None, typer.Option(help="Run folder; runs/NAME unless given.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Override, e.g. stages.stage1.steps=100. Repeatable."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, show the plan and stop.")] = False,
) -> None:
    """Run a curriculum on this machine. The same command again goes on where it stopped."""
    try:
        config = load_curriculum(curriculum, overrides or ())
        run_folder = folder.normalise(out or Path("runs") / config.name)
        jobs = chain(config, run_folder)
        Console().print(_plan_table(config, run_folder))
        folder.check(config, run_folder)
        if dry_run:
            return
        with locked(run_folder) as lock:
            # Again, for another launcher may have come between.
            folder.check(config, run_folder)
            folder.write(config, run_folder)
            code = local.run(jobs, Ledger(run_folder / "ledger.jsonl"), lock)
    except (ValueError, LockedError) as error:
        _fail(str(error), 2)
    if code:
        _fail(f"{run_folder} is not finished. To go on: python -m launcher {shlex.join(sys.argv[1:])}", code)
    print("\nfinished:", *(f"  {product}" for job in jobs[-2:] for product in job.products), sep="\n")


@app.command()
def status(run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Show how far each job of a run is."""
    try:
        config = load_curriculum(run_folder / folder.CURRICULUM)
    except ValueError as error:
        _fail(str(error), 2)
    Console().print(_status_table(statuses(chain(config, run_folder), Ledger(run_folder / "ledger.jsonl"))))


def _plan_table(config: Curriculum, run_folder: Path) -> Table:
    """One column for each stage, which fits four of them into a narrow terminal."""
    table = Table(title=f"{config.name} in {run_folder}", box=box.HORIZONTALS, padding=(0, 1, 0, 0), show_lines=True)
    for heading in ("", *(stage.name for stage in config.stages)):
        table.add_column(heading, overflow="fold")
    stages = [one.stage for one in stage_runs(config, run_folder)]
    batches = [config.memory.micro_batch_at(stage.resolution, stage.global_batch) for stage in stages]
    table.add_row("resolution", *(f"{stage.resolution} px" for stage in stages))
    table.add_row("trains", *("\n".join(stage.trains) for stage in stages))
    table.add_row("objective", *(stage.objective.kind for stage in stages))
    table.add_row("mixture", *("\n".join(f"{share:g} {task}" for task, share in s.mixture.items()) for s in stages))
    table.add_row("batch", *(f"{micro} x {accumulation}" for micro, accumulation in batches))
    table.add_row("steps", *(str(stage.steps) for stage in stages))
    table.add_row("start", *(_start(stage.start, run_folder) for stage in stages))
    return table


def _start(start: Path | None, run_folder: Path) -> str:
    if start is None:
        return "backbones"
    if start.is_relative_to(run_folder):
        return "\n".join(part for part in start.relative_to(run_folder).parts if part != "checkpoints")
    return str(start)


def _status_table(rows: list[Status]) -> Table:
    table = Table("job", "state", "step", "loss", "attempts", box=None)
    for row in rows:
        step = "" if row.steps is None else f"{row.step}/{row.steps}"
        table.add_row(row.job, row.state, step, "" if row.loss is None else f"{row.loss:.4f}", str(row.attempts))
    return table


def _fail(sentence: str, code: int) -> None:
    typer.echo(sentence, err=True)
    raise typer.Exit(code)
