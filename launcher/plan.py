"""A curriculum as a chain of jobs. Pure: nothing is read, written or started here."""

import sys
from pathlib import Path

from launcher.job import MANIFEST, Job, checkpoint
from wemmu.config import Curriculum, StageRun

TOOLS = Path(__file__).resolve().parent.parent / "tools"
# A stage's job and folder bear the stage's name, so these are taken.
RESERVED = ("data", "export", "report", "lock")


def stage_runs(curriculum: Curriculum, run: Path) -> tuple[StageRun, ...]:
    """The config of each stage's job in the run folder `run`.

    A stage without `start` gets the last checkpoint of the stage before; the first starts from the backbones alone.
    """
    runs: list[StageRun] = []
    for stage in curriculum.stages:
        alone = curriculum.stage_run(stage.name)
        if stage.start is None and runs:
            before = runs[-1].stage
            linked = stage.model_copy(update={"start": checkpoint(run / before.name, before.steps)})
            alone = alone.model_copy(update={"stage": linked})
        runs.append(alone)
    return tuple(runs)


def chain(curriculum: Curriculum, run: Path) -> tuple[Job, ...]:
    """The jobs of a curriculum in the order in which they run.

    Raises:
        ValueError: if a stage has a name that is needed for something else.
    """
    if taken := [stage.name for stage in curriculum.stages if stage.name in RESERVED]:
        raise ValueError(f"a stage cannot be called {taken[0]!r}; these names are taken: {', '.join(RESERVED)}")
    jobs = [_data(run)] if curriculum.data.prepare else []
    for stage in curriculum.stages:
        folder = run / stage.name
        manifest = checkpoint(folder, stage.steps) / MANIFEST
        train = _python("-m", "wemmu.train", folder / "config.yaml")
        if curriculum.parallel.ranks > 1:
            train = _python("-m", "launcher.ranks", str(curriculum.parallel.ranks), *train)
        jobs.append(Job(stage.name, train, folder / "log.txt", products=(manifest,), steps=stage.steps))
        if curriculum.evaluation.prompts:
            jobs.append(_evaluation(stage.name, folder, manifest))
    results = tuple(product for job in jobs for product in job.products)
    export = _export(run, checkpoint(run / curriculum.stages[-1].name, curriculum.stages[-1].steps) / MANIFEST)
    return (*jobs, export, _report(run, (*results, *export.products)))


def _data(run: Path) -> Job:
    # Which shards are whole is the pipeline's own knowledge, hence no products.
    return Job("data", _python("-m", "data_pipeline", "write", run / "curriculum.yaml"), run / "data.log")


def _evaluation(stage: str, folder: Path, manifest: Path) -> Job:
    return Job(
        f"{stage}/evaluation",
        _python("-m", "wemmu.evaluate", folder),
        folder / "evaluation.log",
        products=(folder / "evaluation.json",),
        inputs=(manifest,),
    )


def _export(run: Path, manifest: Path) -> Job:
    return Job(
        "export",
        _python(TOOLS / "convert_ckpt.py", run, "--out", run / "export"),
        run / "export.log",
        # diffusers writes the index of a pipeline last.
        products=(run / "export" / "model_index.json",),
        inputs=(manifest,),
    )


def _report(run: Path, inputs: tuple[Path, ...]) -> Job:
    return Job(
        "report",
        _python("-m", "wemmu.report", run),
        run / "report.log",
        products=(run / "report.html", run / "samples.png"),
        inputs=inputs,
    )


def _python(*arguments: str | Path) -> tuple[str, ...]:
    return (sys.executable, *map(str, arguments))
