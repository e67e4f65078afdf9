"""Checks a curriculum and its run folder before the first job, and writes the folder's first files."""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launcher.lock import LOCK, SUBMISSION
from launcher.plan import config_file, stage_runs
from wemmu.config import Curriculum, dump, load_curriculum
from wemmu.config.base import differences
from wemmu.config.benchmarks import inputs

CURRICULUM = "curriculum.yaml"
CLUSTER = "cluster.yaml"
# Files of a run folder whose first launcher was killed before it wrote the curriculum.
_FIRST_TRACES = {LOCK, SUBMISSION, "curriculum.yaml.tmp"}
_SHOWN = 20
# Fields that do not change the result: they may change between two launches.
_FREE = re.compile(
    r"parallel\.|memory\.|logging\.|threads$|data\.resume_reordered$|stages\.[^.]+\.gate\."
    r"|evaluation\.(benchmarks|ranks)|stages\.[^.]+\.benchmarks"
)


class RefusedError(ValueError):
    """The curriculum cannot run, or not in this folder. Nothing has started and nothing is written."""


def normalise(run: Path) -> Path:
    """Return one spelling of a folder, so that paths in written configs stay equal from run to run."""
    here = Path.cwd()
    full = Path(os.path.abspath(run.expanduser()))
    return full.relative_to(here) if full.is_relative_to(here) else full


def newest(runs: Path = Path("runs")) -> Path:
    """The run folder whose jobs began or ended last.

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
    """The curriculum of a run folder."""
    return load_curriculum(curriculum_file(run), overrides)


def curriculum_file(run: Path) -> Path:
    """Raises RefusedError if `run` is not a run folder; names those beside it."""
    if not (run / CURRICULUM).exists():
        there = ", ".join(sorted(str(file.parent) for file in run.parent.glob(f"*/{CURRICULUM}"))) or "none"
        raise RefusedError(f"{run} is not a run folder: it has no {CURRICULUM}; run folders in {run.parent}: {there}")
    return run / CURRICULUM


def check(curriculum: Curriculum, run: Path) -> None:
    """Check paths and run folder.

    Raises:
        RefusedError: names every missing path of the curriculum; or, if the folder holds another run, the fields that
            differ and the choices.
    """
    given = curriculum.backbones.directories(curriculum.recipe.backbones)
    needed = {f"backbones.{name}": directory for name, directory in given.items()}
    needed |= {f"stages.{stage.name}.start": stage.start for stage in curriculum.stages if stage.start}
    if curriculum.data.prepare is None and curriculum.data.remote is None:
        needed["data.shards"] = curriculum.data.shards
    absent = [f"  {field}: {path} is not a directory" for field, path in needed.items() if not path.is_dir()]
    if absent := [*absent, *_absent_of_benchmarks(curriculum)]:
        raise RefusedError("\n".join([f"the curriculum {curriculum.name} names paths that do not exist:", *absent]))
    _check_folder(curriculum, run)


def _absent_of_benchmarks(curriculum: Curriculum) -> Iterator[str]:
    for stage in curriculum.stages:
        where = "evaluation" if stage.benchmarks is None else f"stages.{stage.name}"
        for name, options in curriculum.evaluation.after(stage).items():
            for field, path in inputs(options).items():
                # The run's own data set may still be written.
                if path != curriculum.data.shards and not path.exists():
                    yield f"  {where}.benchmarks.{name}.{field}: {path} does not exist"


def write(curriculum: Curriculum, run: Path) -> None:
    """Write the resolved curriculum and the config of every training job."""
    dump(curriculum, run / CURRICULUM)
    for config in stage_runs(curriculum, run):
        home = run / config.stage.name
        home.mkdir(exist_ok=True)
        dump(config, config_file(home, config.stage))
        if config.stage.resolutions and config.stage.is_last:
            dump(config, home / "config.yaml")


def _check_folder(curriculum: Curriculum, run: Path) -> None:
    file = run / CURRICULUM
    if file.exists():
        if changed := list(changes(load_curriculum(file), curriculum)):
            more = [f"  and {len(changed) - _SHOWN} more"] if len(changed) > _SHOWN else []
            raise RefusedError(
                "\n".join([f"{run} holds a run of another config; old -> new:", *changed[:_SHOWN], *more])
                + f"\nTo keep that run, give another folder with --run; to resume it, undo the changes; "
                f"to start again, delete {run}."
            )
    elif run.exists() and (not run.is_dir() or {entry.name for entry in run.iterdir()} - _FIRST_TRACES):
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
