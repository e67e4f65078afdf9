"""A curriculum as a chain of jobs. Pure: nothing is read, written or started here."""

import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.gate import Gate
from launcher.job import MANIFEST, Job, checkpoint
from wemmu.config import Curriculum, Stage, StageRun

TOOLS = Path(__file__).resolve().parent.parent / "tools"
# A stage's job and folder bear the stage's name, so these are taken.
RESERVED = ("data", "export", "report", "lock")
EVALUATION = "/evaluation"
# Scripts of stages there are in slurm/; a later stage runs by the last of them.
SCRIPTS = 4


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
    for index in range(len(curriculum.stages)):
        jobs += _stage(curriculum, run, index, jobs)
    last = curriculum.stages[-1]
    manifest = checkpoint(run / last.name, last.steps) / MANIFEST
    results = tuple(product for job in jobs for product in job.products)
    export = _export(run, manifest, last.name)
    evaluations = [job.name for job in jobs if job.name.endswith(EVALUATION)]
    return (*jobs, export, _report(run, (*results, *export.products), (*evaluations, export.name)))


def _stage(curriculum: Curriculum, run: Path, index: int, before: Sequence[Job]) -> list[Job]:
    stage, folder = curriculum.stages[index], run / curriculum.stages[index].name
    manifest = checkpoint(folder, stage.steps) / MANIFEST
    # Weights of its own make a stage independent of the one before.
    gate = _gate(curriculum.stages[index - 1], run) if index and stage.start is None else None
    # A stage waits for the one before it, whose evaluation runs beside it unless its gate has to know the scores.
    waits = [job.name for job in before if not job.name.endswith(EVALUATION)][-1:]
    if gate and gate.scores:
        waits.append(gate.stage + EVALUATION)
    train = Job(
        stage.name,
        _python("-m", "wemmu.train", folder / "config.yaml"),
        folder / "log.txt",
        products=(manifest,),
        steps=stage.steps,
        after=tuple(waits),
        ranks=curriculum.parallel.ranks,
        hang_after=curriculum.logging.hang_after,
        script=f"stage{min(index + 1, SCRIPTS)}.sh",
        gate=gate,
    )
    return [train, _evaluation(stage.name, folder, manifest)] if curriculum.evaluation.prompts else [train]


def _gate(stage: Stage, run: Path) -> Gate:
    folder = run / stage.name
    manifest = checkpoint(folder, stage.steps) / MANIFEST
    scores = {str(task): lowest for task, lowest in stage.gate.scores.items()}
    return Gate(stage.name, folder, manifest, stage.trains, stage.gate.max_loss, scores)


def _data(run: Path) -> Job:
    # Which shards are whole is the pipeline's own knowledge, hence no products.
    command = _python("-m", "data_pipeline", "write", run / "curriculum.yaml")
    return Job("data", command, run / "data.log", script="data.sh")


def _evaluation(stage: str, folder: Path, manifest: Path) -> Job:
    return Job(
        stage + EVALUATION,
        _python("-m", "wemmu.evaluate", folder),
        folder / "evaluation.log",
        products=(folder / "evaluation.json",),
        inputs=(manifest,),
        after=(stage,),
        script="evaluate.sh",
    )


def _export(run: Path, manifest: Path, stage: str) -> Job:
    return Job(
        "export",
        _python(TOOLS / "convert_ckpt.py", run, "--out", run / "export"),
        run / "export.log",
        # diffusers writes the index of a pipeline last.
        products=(run / "export" / "model_index.json",),
        inputs=(manifest,),
        after=(stage,),
        script="export.sh",
    )


def _report(run: Path, inputs: tuple[Path, ...], after: tuple[str, ...]) -> Job:
    return Job(
        "report",
        _python("-m", "wemmu.report", run),
        run / "report.log",
        products=(run / "report.html", run / "samples.png"),
        inputs=inputs,
        after=after,
        script="report.sh",
    )


def _python(*arguments: str | Path) -> tuple[str, ...]:
    return (sys.executable, *map(str, arguments))
