"""Checks a curriculum and its run folder before the first job, and writes the folder's first files."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import typer

from launcher.lock import LOCK, SUBMISSION
from launcher.plan import config_file, stage_runs
from wemmu.config import Curriculum, dump, load_curriculum
from wemmu.config.base import differences
from wemmu.config.files import barely_begun, nearest
from wemmu.diagnosis.findings import Call, examine
from wemmu.readable import namesake

CURRICULUM = "curriculum.yaml"
CLUSTER = "cluster.yaml"
_SHOWN = 20
# Fields that do not change the result: they may change between two launches.
_FREE = re.compile(
    r"parallel\.|memory\.|logging\.|threads$|data\.resume_reordered$|stages\.[^.]+\.gate\."
    r"|evaluation\.(benchmarks|ranks)|stages\.[^.]+\.benchmarks"
)


class RefusedError(ValueError):
    """The curriculum cannot run, or not in this folder. Nothing has started and nothing is written."""


def normalise(run: Path) -> Path:
    """Return one spelling of a folder, so that paths in written configs stay equal from run to run.

    It is relative in the working directory, unless it would look like an option of the jobs' commands.
    """
    here = Path.cwd()
    full = Path(os.path.abspath(run.expanduser()))
    short = full.relative_to(here) if full.is_relative_to(here) else full
    return full if str(short).startswith("-") else short


def newest(runs: Path = Path("runs")) -> Path:
    """Return the run folder whose jobs began or ended last.

    Raises:
        ValueError: if there is none.
    """

    def touched(curriculum: Path) -> int:
        ledger = curriculum.with_name("ledger.jsonl")
        return (ledger if ledger.exists() else curriculum).stat().st_mtime_ns

    if not (found := sorted(runs.glob(f"*/{CURRICULUM}"), key=touched)):
        raise ValueError(f"no run folder was given, and {runs}/ contains none; give one")
    return found[-1].parent


def opened(run: Path, overrides: Sequence[str] = ()) -> Curriculum:
    """Return the curriculum of a run folder."""
    return load_curriculum(curriculum_file(run), overrides)


def curriculum_file(run: Path) -> Path:
    """Raise RefusedError if `run` is not a run folder; names those beside it."""
    if not (run / CURRICULUM).exists():
        places = (run.parent, run, Path("runs"))
        there = sorted({file.parent for place in places for file in place.glob(f"*/{CURRICULUM}")})
        around = [run.parent] if (run.parent / CURRICULUM).exists() else namesake(run, there)
        question = "".join(f"did you mean {one}? " for one in around)
        beside = f"{question}run folders near it or in runs/: {', '.join(map(str, there)) or 'none'}"
        raise RefusedError(f"{run} is not a run folder: it has no {CURRICULUM}; {beside}")
    return run / CURRICULUM


def refuse_problems(curriculum: Curriculum, calls: Iterable[Call]) -> None:
    """Print the warnings of the checks (`wemmu.diagnosis.preflight`); raises RefusedError naming all problems."""
    findings = [examine(check, *arguments) for check, *arguments in calls]
    if wrong := [f"  {finding.words}" for finding in findings if finding.status == "problem"]:
        raise RefusedError("\n".join([f"the curriculum {curriculum.name} cannot run here:", *wrong]))
    for finding in findings:
        if finding.status == "warning":
            typer.echo(f"warning: {finding.words}", err=True)


def write(curriculum: Curriculum, run: Path) -> None:
    """Write the resolved curriculum and the config of every training job."""
    dump(curriculum, run / CURRICULUM)
    for config in stage_runs(curriculum, run):
        home = run / config.stage.name
        home.mkdir(exist_ok=True)
        dump(config, config_file(home, config.stage))
        if config.stage.resolutions and config.stage.is_last:
            dump(config, home / "config.yaml")


def check(curriculum: Curriculum, run: Path) -> None:
    """Raise RefusedError if the folder holds another run, with the fields that differ and the choices."""
    file = run / CURRICULUM
    # A path makes one slash of two.
    if re.match(r"[a-z][a-z0-9+]+:/", str(run)):
        raise RefusedError(f"{run} is a URL; a run folder is a path on a disk of this machine or of all nodes")
    place = nearest(run)
    if place != run and not place.is_dir():
        raise RefusedError(f"{run} cannot be a run folder: {place} is a file; give another one with --run")
    if not os.access(place, os.W_OK):
        raise RefusedError(f"{run} cannot be a run folder: {place} cannot be written; give another one with --run")
    if file.exists():
        if changed := list(changes(load_curriculum(file), curriculum)):
            more = [f"  and {len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else []
            raise RefusedError(
                "\n".join([f"{run} holds a run of another config; old -> new:", *changed[:_SHOWN], *more])
                + f"\nTo keep that run, give another folder with --run; to resume it, undo the changes; "
                f"to start again, delete {run}."
            )
    elif run.exists() and not (run.is_dir() and barely_begun(run, CURRICULUM, (LOCK, SUBMISSION))):
        raise RefusedError(f"{run} exists and is not a run folder; give another one with --run")


def changes(before: Curriculum, now: Curriculum) -> Iterator[str]:
    """Return one line per field that changes the result and differs between two curricula."""
    here = os.getcwd()
    for field, was, is_ in differences(_by_stage(before), _by_stage(now), (here, here)):
        if not _FREE.match(field):
            yield f"  {field}: {was} -> {is_}"


def _by_stage(curriculum: Curriculum) -> dict[str, Any]:
    tree = curriculum.model_dump(mode="json")
    order = [stage["name"] for stage in tree["stages"]]
    return tree | {"stages": {stage["name"]: stage for stage in tree["stages"]}, "order of stages": order}
