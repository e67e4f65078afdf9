"""Checks by files and arithmetic whether a curriculum can run. Needs no torch, so it runs on a login node."""

import glob
import shutil
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

from wemmu.config import Curriculum, load_curriculum
from wemmu.config.base import ConfigError
from wemmu.config.benchmarks import inputs as files_of
from wemmu.config.exported import is_export
from wemmu.config.neighbours import instead
from wemmu.config.patterns import escaped, expanded
from wemmu.config.prepare import Prepare, StoredSource
from wemmu.config.serving import check_files, check_preparable, check_readable, needs, serving
from wemmu.config.shards import DATASET_FILE, DataSet, ShardError, refuse_foreign
from wemmu.diagnosis.findings import Call, Finding
from wemmu.diagnosis.host import existing
from wemmu.planning import layout
from wemmu.planning.ask import PlanError, RefusedModelError, configs_of
from wemmu.planning.plan import (
    Assumptions,
    Machine,
    Plan,
    above_memory,
    check_degrees,
    check_split,
    parameters_of,
    plan,
)
from wemmu.published.check import check, check_engine, problems
from wemmu.published.known import VLM
from wemmu.published.layout import BackboneError
from wemmu.readable import human

_BACKBONES = (
    "put the published directories (Qwen2.5-VL-3B-Instruct, Sana_1600M_1024px_diffusers) on disk, whole, and name them "
    "under backbones:; a relative path is looked for beside the curriculum, then in the working directory"
)
_MANIFEST = "manifest.json"
MEMORY = "a smaller memory.micro_batch, memory.checkpointing: true, more ranks; see `wemmu plan`"


def calls(curriculum: Curriculum, run: Path) -> list[Call]:
    """Return the checks that need neither torch nor the machine that trains."""
    layout_and_disks = [(degrees, curriculum), (checkpoint_disk, curriculum, run), (data_disk, curriculum)]
    return [*inputs(curriculum), *layout_and_disks]


def inputs(curriculum: Curriculum) -> list[Call]:
    """Return the checks of what the curriculum reads from disk; each takes at most a second."""
    return [
        (check, curriculum)
        for check in (backbones, libraries, random_parts, unused_options, starts, sample_images, benchmark_inputs, data)
    ]


def loads(path: Path) -> Finding:
    try:
        curriculum = load_curriculum(path)
    except ConfigError as error:
        return Finding("curriculum", "problem", str(error), "correct it; `wemmu config list` lists examples")
    stages = ", ".join(f"{s.name} at {', '.join(map(str, s.resolutions))} px" for s in curriculum.stages)
    return Finding("curriculum", "ok", f"{curriculum.name}: {stages}")


def backbones(curriculum: Curriculum) -> Finding:
    """Check the directories without reading weights; reports the errors of the loaders."""
    chosen, prepare = curriculum.backbones, curriculum.data.prepare
    wrong = problems(chosen, curriculum.recipe.backbones)
    if prepare is not None and prepare.caption is not None and prepare.caption.vlm != chosen.vlm:
        try:
            check(prepare.caption.vlm, VLM, with_processor=True)
        except BackboneError as error:
            wrong.append(f"data.prepare.caption.vlm: {error}")
    if wrong:
        return Finding("backbones", "problem", "; ".join(wrong), _BACKBONES)
    return Finding(
        "backbones",
        "ok",
        f"{', '.join(map(str, chosen.directories(curriculum.recipe.backbones).values()))}, in the published layout",
    )


def libraries(curriculum: Curriculum) -> Finding:
    """Check that what only some curricula need is installed, without importing it."""
    if curriculum.memory.quantize and find_spec("bitsandbytes") is None:
        remedy = "`pip install 'wemmu[quantize]'`, or remove memory.quantize"
        return Finding("libraries", "problem", "memory.quantize needs bitsandbytes, which is not installed", remedy)
    return Finding("libraries", "ok", "all that the curriculum needs are installed")


def random_parts(curriculum: Curriculum) -> Finding:
    """Warn of modules that begin with random numbers and keep them through all stages."""
    trained = {module for stage in curriculum.stages for module in stage.trains}
    brought = curriculum.export is not None or curriculum.stages[0].start is not None
    if left := [module for module in curriculum.recipe.random if not brought and module not in trained]:
        found = f"no stage trains {', '.join(left)}, and nothing pre-trained brings it: it stays random"
        remedy = "name it in the `trains` of a stage, or give the first stage a `start`"
        return Finding("modules", "warning", found, remedy)
    return Finding("modules", "ok", "all that begin at random are trained")


def unused_options(curriculum: Curriculum) -> Finding:
    """Warn of options that are set and that nothing uses, so that they change nothing."""
    found = {f"recipe.{field}": why for field, why in curriculum.recipe.unused(curriculum.stages).items()}
    for stage in curriculum.stages:
        found |= {f"stages.{stage.name}.objective.{name}": why for name, why in stage.objective.unused.items()}
    if found:
        told = "; ".join(f"{field} changes nothing, because {why}" for field, why in found.items())
        return Finding("options", "warning", told, "remove them, or change what switches them off")
    return Finding("options", "ok", "all that are set are used")


def starts(curriculum: Curriculum) -> Finding:
    starts = {stage.name: stage.start for stage in curriculum.stages if stage.start}
    lacking = {name: path for name, path in starts.items() if not ((path / _MANIFEST).is_file() or is_export(path))}
    if absent := [f"stages.{name}.start: {path}{instead(path, 'weights')}" for name, path in lacking.items()]:
        remedy = "name the directory of a checkpoint, of shipped weights or of an exported pipeline, or remove `start`"
        found = f"no checkpoint, since it holds no {_MANIFEST}: {'; '.join(absent)}"
        return Finding("weights to start from", "problem", found, remedy)
    found = f"{len(starts)} of {len(curriculum.stages)} stages start from weights of their own"
    return Finding("weights to start from", "ok", found)


def sample_images(curriculum: Curriculum) -> Finding:
    """Check the images of the fixed prompts; a stage opens them only after hundreds of steps."""
    images = [path for prompt in curriculum.sampling.prompts for path in prompt.images]
    if absent := [str(path) for path in images if not path.is_file()]:
        remedy = "name existing files, or remove these prompts"
        return Finding("sampling.prompts", "problem", f"no such image: {', '.join(absent)}", remedy)
    return Finding("sampling.prompts", "ok", f"{len(curriculum.sampling.prompts)} prompts with {len(images)} images")


def benchmark_inputs(curriculum: Curriculum) -> Finding:
    """Check the folders and files that benchmarks read; one runs only after its stage."""
    absent: list[str] = []
    for stage in curriculum.stages:
        where = "evaluation" if stage.benchmarks is None else f"stages.{stage.name}"
        for name, options in curriculum.evaluation.after(stage).items():
            # The run's own data set may still be written.
            read = {field: path for field, path in files_of(options).items() if path != curriculum.data.shards}
            absent += [f"{where}.benchmarks.{name}.{field}: {p}" for field, p in read.items() if not p.exists()]
    if absent:
        remedy = "name existing folders and files, or remove these benchmarks"
        return Finding("benchmarks", "problem", f"not there: {'; '.join(dict.fromkeys(absent))}", remedy)
    return Finding("benchmarks", "ok", "all their files exist")


def degrees(curriculum: Curriculum) -> Finding:
    said = Machine.of(curriculum).degrees
    try:
        configs_of(curriculum.stage_run(curriculum.stages[0].name))
    except PlanError:
        return not_told("parallel degrees")
    try:
        check_engine(curriculum.backbones, curriculum.recipe.backbones, curriculum.parallel.engine)
        check_degrees(curriculum, said)
        check_split(curriculum, said)
    except (BackboneError, PlanError) as error:
        return Finding("parallel degrees", "problem", str(error), "change parallel: as the message says")
    found = f"engine {curriculum.parallel.engine}, ranks {said.world}, tp {said.tp}, pp {said.pp}"
    return Finding("parallel degrees", "ok", found)


def data(curriculum: Curriculum) -> Finding:
    """Check the shards, or their sources. A remote data set is not checked, because that needs the network."""
    config = curriculum.data
    if config.remote is not None:
        return Finding("data", "ok", f"read from {config.remote} when a run starts; not tried here")
    if config.prepare is not None and not (config.shards / DATASET_FILE).exists():
        return _preparable(curriculum, config.prepare)
    try:
        streams = DataSet.at(config.shards).streams
        read = needs(curriculum.stages)
        check_readable(config.shards, streams, read)
        used = {s.settings.name: s for need in read for s in serving(streams, need.task, need.resolution)}
        check_files(config.shards, used.values(), shards_too=config.damaged == "stop")
    except ShardError as error:
        remedy = "run `wemmu data write CURRICULUM`, or name a finished data set in data.shards"
        return Finding("data", "problem", str(error), remedy)
    return Finding("data", "ok", f"{config.shards} is complete: {', '.join(s.settings.name for s in streams)}")


def _preparable(curriculum: Curriculum, prepare: Prepare) -> Finding:
    # Remote paths are not checked.
    local = [s for s in prepare.sources if isinstance(s, StoredSource) and "://" not in s.path]
    folders = [f"{s.name}: {s.path}" for s in local if s.of_files and Path(s.path).is_dir()]
    if folders:
        remedy = "name the files in it, as DIR/*.parquet or DIR/*.tar"
        return Finding("data", "problem", f"a directory instead of files: {'; '.join(folders)}", remedy)
    if absent := [f"{s.name}: {path}" for s in local for path in _missing(s.path)]:
        remedy = "correct data.prepare.sources; `wemmu data buckets CURRICULUM` tries them"
        return Finding("data", "problem", f"nothing matches the path of {'; '.join(absent)}", remedy)
    try:
        refuse_foreign(curriculum.data.shards)
    except ShardError as error:
        return Finding("data", "problem", str(error), "a folder that is new, empty or a data set")
    try:
        check_preparable(curriculum, prepare)
    except ShardError as error:
        return Finding("data", "problem", str(error), "data.prepare.sources of all tasks that a stage mixes")
    names = ", ".join(source.name for source in prepare.sources)
    return Finding("data", "ok", f"{curriculum.data.shards} is not complete yet; the data job writes it from {names}")


def _missing(path: str) -> list[str]:
    """Return the parts of a local path, with wildcards and braces, that match no file."""
    if Path(path).exists():
        return []
    return [p for p in expanded(path) if not glob.glob(escaped(p, lambda name: Path(name).exists()), recursive=True)]


def checkpoint_disk(curriculum: Curriculum, run: Path) -> Finding:
    name, keep = "disk for checkpoints", curriculum.logging.keep_checkpoints
    try:
        model = parameters_of(curriculum)
    except RefusedModelError as error:
        return Finding("model", "problem", str(error), "correct it in the curriculum")
    except PlanError:
        return not_told(name)
    runs = [curriculum.stage_run(stage.name) for stage in curriculum.stages]
    trained = [run.stage.trains for run in runs]
    sizes = [layout.checkpoint(model, one, chain.from_iterable(trained[:i])) for i, one in enumerate(runs)]
    folder, largest = existing(run), max(sizes)
    free = shutil.disk_usage(folder).free
    # The next one is written before the oldest is removed, and a finished stage keeps its own.
    stage, whole = largest * (keep + 1), sum(sizes) * keep + largest
    found = (
        f"{human(stage, 'B')} for a stage, {human(whole, 'B')} for all, {human(free, 'B')} free at {folder.absolute()}"
    )
    remedy = "free some, logging.keep_checkpoints smaller, or another disk: --run"
    if free < stage:
        return Finding(name, "problem", found, remedy)
    return Finding(name, "ok" if free >= whole else "warning", found, None if free >= whole else remedy)


def data_disk(curriculum: Curriculum) -> Finding:
    config = curriculum.data
    folder = existing(config.shards)
    free = shutil.disk_usage(folder).free
    found = f"{human(free, 'B')} free at {folder.absolute()}"
    if config.cache_gb is None:
        return Finding("disk for data", "ok", found)
    held = (
        sum(file.stat().st_size for file in config.shards.rglob("*") if file.is_file()) if config.shards.is_dir() else 0
    )
    found = f"{found}, the cache may take {config.cache_gb:g} GB and holds {human(held, 'B')}"
    if free + held < config.cache_gb * 1e9:
        return Finding("disk for data", "problem", found, "data.cache_gb smaller, or data.shards on another disk")
    return Finding("disk for data", "ok", found)


def planned_memory(curriculum: Curriculum, gpu: str) -> Finding:
    """Check whether the stages fit GPUs of this kind, as the model was measured."""
    name, planned = "GPU memory of the plan", plan_of(curriculum, gpu)
    if planned is None:
        return not_told(name)
    if too_much := above_memory(planned):
        return Finding(name, "warning", "; ".join(too_much), MEMORY)
    return Finding(name, "ok", f"all stages fit GPUs of the kind {gpu}")


def plan_of(curriculum: Curriculum, gpu: str = "h100") -> Plan | None:
    """Return the plan, or None if there can be none. The MFU affects hours only, not bytes."""
    try:
        return plan(curriculum, Machine.of(curriculum, gpu), Assumptions())
    except PlanError:
        return None


def not_told(name: str) -> Finding:
    return Finding(name, "warning", "unknown", "first fix backbones: or parallel:")
