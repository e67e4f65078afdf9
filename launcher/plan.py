"""Turns a curriculum into a chain of jobs. Writes and starts nothing."""

import sys
from collections.abc import Sequence
from pathlib import Path

from launcher.gate import Gate
from launcher.job import Job, checkpoint, is_finished
from wemmu.config import Curriculum, ResolutionStep, Stage, StageRun
from wemmu.config.benchmarks import RESULTS, card_file
from wemmu.config.checkpoints import MANIFEST
from wemmu.config.next_resolution import record_file
from wemmu.config.shipped import HOME
from wemmu.readable import valid

# Names of other jobs and files, which a stage cannot have.
RESERVED = ("data", "export", "report", "lock")
EVALUATION = "/evaluation"


def stage_runs(curriculum: Curriculum, run: Path) -> tuple[StageRun, ...]:
    """Return the config of each stage's job, one per resolution.

    A stage without `start` starts from the last checkpoint of the previous stage, the first from the backbones.
    """
    runs: list[StageRun] = []
    for stage in curriculum.stages:
        start = stage.start
        if start is None and runs:
            before = runs[-1].stage
            start = checkpoint(run / before.name, before.steps)
        runs += [alone.changed({"stage.start": start}) for alone in curriculum.resolution_runs(stage.name)]
    return tuple(runs)


def config_file(stage_folder: Path, stage: ResolutionStep) -> Path:
    """Return the path of a job's config; the last resolution's is the stage's `config.yaml`, which others read."""
    return stage_folder / (f"config-{stage.resolution}.yaml" if stage.resolutions else "config.yaml")


def find(jobs: Sequence[Job], name: str) -> Job:
    """Return the job `name`; for a stage with several resolutions the first unfinished one, or the last.

    Raises:
        ValueError: if there is no such job; lists the valid names.
    """
    found = [job for job in jobs if name == job.name or (job.resolution and name == job.folder.name)]
    if not found:
        raise ValueError(f"there is no job {name!r}; {valid(name, [job.name for job in jobs], 'valid choices')}")
    return next((job for job in found if not is_finished(job)), found[-1])


def chain(curriculum: Curriculum, run: Path) -> tuple[Job, ...]:
    """Return the jobs of a curriculum in the order in which they run.

    Raises:
        ValueError: if a stage has a reserved name.
    """
    if taken := [stage.name for stage in curriculum.stages if stage.name in RESERVED]:
        raise ValueError(f"a stage cannot be called {taken[0]!r}; these names are taken: {', '.join(RESERVED)}")
    jobs = [_data(run)] if curriculum.data.prepare else []
    for index in range(len(curriculum.stages)):
        jobs += _stage(curriculum, run, index, jobs)
    last = curriculum.stages[-1]
    manifest = checkpoint(run / last.name, last.steps) / MANIFEST
    results = tuple(product for job in jobs for product in job.products)
    export = _export(run, manifest, last.resolution_steps[-1].label)
    evaluations = [job.name for job in jobs if job.evaluates]
    return (*jobs, export, _report(run, (*results, *export.products), (*evaluations, export.name)))


def _stage(curriculum: Curriculum, run: Path, index: int, before: Sequence[Job]) -> list[Job]:
    stage, folder = curriculum.stages[index], run / curriculum.stages[index].name
    manifest = checkpoint(folder, stage.steps) / MANIFEST
    # A stage with `start` does not need the previous stage.
    gate = _gate(curriculum, curriculum.stages[index - 1], run) if index and stage.start is None else None
    # A stage waits for the previous stage, and for its evaluation only if the gate needs scores.
    waits = [job.name for job in before if not job.evaluates][-1:]
    if gate and gate.scores:
        waits.append(gate.stage + EVALUATION)
    if gate:
        waits += dict.fromkeys(f"{gate.stage}/{bound.benchmark}" for bound in gate.benchmarks)
    jobs: list[Job] = []
    for step in stage.resolution_steps:
        jobs.append(
            Job(
                step.label,
                _python("-m", "wemmu.train", config_file(folder, step)),
                folder / (f"log-{step.resolution}.txt" if step.resolutions else "log.txt"),
                products=(manifest,) * step.is_last + (record_file(folder),) * bool(step.resolutions),
                steps=step.span[1],
                after=(jobs[-1].name,) if jobs else tuple(waits),
                ranks=curriculum.parallel.ranks,
                hang_after=curriculum.logging.hang_after,
                script="stage.sh",
                gate=None if jobs else gate,
                resolution=step.resolution if step.resolutions else None,
            )
        )
    last = jobs[-1].name
    scored = (*(None,) * bool(curriculum.evaluation.prompts), *curriculum.evaluation.after(stage))
    return [*jobs, *(_evaluation(curriculum, folder, manifest, last, name) for name in scored)]


def _gate(curriculum: Curriculum, stage: Stage, run: Path) -> Gate:
    folder = run / stage.name
    manifest = checkpoint(folder, stage.steps) / MANIFEST
    scores = {str(task): lowest for task, lowest in stage.gate.scores.items()}
    modules = {module: curriculum.recipe.modules[module] for module in stage.trains}
    return Gate(stage.name, folder, manifest, modules, stage.gate.max_loss, scores, stage.gate.benchmarks)


def _data(run: Path) -> Job:
    # Only the pipeline knows which shards are whole, hence no products.
    command = _python("-m", "data_pipeline", "write", run / "curriculum.yaml")
    return Job("data", command, run / "data.log", script="data.sh")


def _evaluation(curriculum: Curriculum, folder: Path, manifest: Path, after: str, benchmark: str | None = None) -> Job:
    """Return the job of a stage's own evaluation, or of a benchmark."""
    ranks, arguments = curriculum.evaluation.ranks, ("--benchmark", benchmark, "--replace") if benchmark else ()
    return Job(
        f"{folder.name}/{benchmark}" if benchmark else folder.name + EVALUATION,
        _python("-m", "wemmu.evaluate", folder, *arguments),
        folder / f"{benchmark or 'evaluation'}.log",
        products=(card_file(folder, benchmark) if benchmark else folder / RESULTS,),
        inputs=(manifest,),
        after=(after,),
        ranks=ranks,
        hang_after=curriculum.logging.hang_after if ranks > 1 else None,
        script="evaluate.sh",
    )


def _export(run: Path, manifest: Path, after: str) -> Job:
    return Job(
        "export",
        _python(HOME / "tools" / "convert_ckpt.py", run, "--out", run / "export"),
        run / "export.log",
        # Written last.
        products=(run / "export" / "parity.json",),
        inputs=(manifest,),
        after=(after,),
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
