"""Measurements of the real model without importing torch: from the cache, or from a child process.

`python -m wemmu.measuring` is that process. Each answer is kept under the hash of all that it depends on: the
config.json files of the backbones, the fields of the run that shape the model and its step, the sample's shape, the
versions of the libraries and this package's own source.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import Progress

from wemmu.config.files import replace_text
from wemmu.config.schema import StageRun
from wemmu.config.task import Task
from wemmu.locks import EXCLUSIVE, LockedError, take
from wemmu.published.check import check_class
from wemmu.published.configs import CONFIGS, packaged
from wemmu.published.known import ENCODER
from wemmu.published.layout import BackboneError, read_json
from wemmu.readable import valid

Answer = dict[str, Any]
# Fields of a run that shape neither a model nor its step.
_IRRELEVANT: dict[str, Any] = {
    **dict.fromkeys(("name", "seed", "data", "sampling", "logging", "evaluation", "threads", "kernels"), True),
    **dict.fromkeys(("parallel", "stage_index"), True),
    "backbones": {"vlm", "vae", "dit"},
    "memory": {"micro_batch", "reference_resolution", "cached_images", "quantize", "offload"},
    "stage": {*("name", "steps", "global_batch", "optimizer", "mixture", "start", "gate")}
    | {"resolutions", "next_resolution"},
}

# Folders of this package that do not decide what is measured: those that stand above `measuring`, and what only shows.
_UNMEASURED = ("diagnosis", "evaluation", "pipeline", "planning", "report", "source", "training", "ui")


class PlanError(ValueError):
    """A plan that cannot be made; the message says what is missing or which choices are valid."""


class RefusedModelError(PlanError):
    """The model's own code refuses the config, as it will when the stage starts."""


_OF_A_RANK = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@dataclass(frozen=True)
class Shape:
    """A micro-batch: text tokens of each prompt without its images, of which `answer` are to be predicted.

    stored: whether the data set stores latents of the images. padded: whether prompts of several lengths are padded.
    """

    task: Task
    height: int
    width: int
    text: int
    images: int
    samples: int = 1
    answer: int = 0
    stored: bool = False
    padded: bool = False


@dataclass(frozen=True)
class Item:
    """One thing to measure.

    parameters: of every part. step: a micro-batch forward and back. slices: the same of each stage of a split DiT.
    """

    kind: Literal["parameters", "step", "slices"]
    run: StageRun
    shape: Shape | None = None
    tp: int = 1
    pp: int = 1

    def request(self) -> dict[str, Any]:
        return {**asdict(self), "run": self.run.model_dump(mode="json")}

    def key(self, configs: dict[str, Any]) -> str:
        run = self.run.model_dump(mode="json", exclude=_IRRELEVANT)
        text = json.dumps([_versions(), configs, {**asdict(self), "run": run}], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def configs_of(run: StageRun) -> tuple[dict[str, Any], tuple[Path, ...]]:
    """Return the config.json of each of a run's backbones and encoders, by its field; weights are not read.

    Also returns the directories that are absent, of which those of the package were taken by their names.

    Raises:
        PlanError: naming a file that is missing or describes another model, and the names that are known.
    """
    found: dict[str, Any] = {}
    absent: list[Path] = []
    encoders = run.recipe.encoders
    for kind, directory in {**run.backbones.directories(run.recipe.backbones), **encoders}.items():
        file = directory / "config.json"
        try:
            config = read_json(file) if directory.exists() else packaged(directory)
            if config is None:
                raise BackboneError(
                    f"{file} is not there, and {directory.name} is none of the published backbones that are known by "
                    f"name; {valid(directory.name, CONFIGS)}. A plan needs the config.json alone, not the weights"
                )
            check_class(file, ENCODER if kind in encoders else kind, config)
        except BackboneError as error:
            raise PlanError(str(error)) from error
        found[kind] = config
        absent += [] if directory.exists() else [directory]
    return found, tuple(absent)


def ask(items: Sequence[Item]) -> list[Answer]:
    """Return the answers to `items`, which have the same backbones; a child process measures what is not cached.

    Raises:
        PlanError: if the model cannot be built or stepped, with its reason.
    """
    configs, _ = configs_of(items[0].run)
    files = [_folder() / f"{item.key(configs)}.json" for item in items]
    if not all(map(_read, files)):
        with _alone():
            missing = {file: item for file, item in zip(files, items, strict=True) if _read(file) is None}
            request = {"configs": configs, "items": [item.request() for item in missing.values()]}
            fresh = dict(zip(missing, map(_keep, missing, _child(request)), strict=True))
    else:
        fresh = {}
    return [fresh.get(file) or _read(file) or {} for file in files]


def _folder() -> Path:
    base = os.environ.get("WEMMU_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "wemmu")
    return Path(base, "measured")


def _read(file: Path) -> Answer | None:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _keep(file: Path, answer: Answer) -> Answer:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        replace_text(file, json.dumps(answer))
    except OSError as error:
        print(f"the measurements cannot be cached in {file.parent} ({error}); set WEMMU_CACHE", file=sys.stderr)
    return answer


@contextmanager
def _alone() -> Iterator[None]:
    """One process of those that share a cache measures; the others wait, and find its answers."""
    with ExitStack() as held:
        # Without a lock the same may be measured twice.
        with suppress(OSError, LockedError):
            _folder().mkdir(parents=True, exist_ok=True)
            file = held.enter_context((_folder() / "lock").open("a", encoding="utf-8"))
            take(file.fileno(), EXCLUSIVE, file.name, wait=True)
        yield


@contextmanager
def written(configs: dict[str, Any]) -> Iterator[Path]:
    """Yield a folder with a directory for each backbone, by its field, that contains its config.json."""
    with tempfile.TemporaryDirectory() as folder:
        for kind, config in configs.items():
            Path(folder, kind).mkdir()
            Path(folder, kind, "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield Path(folder)


def _child(request: dict[str, Any]) -> Iterator[Answer]:
    command = [sys.executable, "-m", "wemmu.measuring"]
    # It finds this package wherever it is started, leaves GPUs alone and is no rank of a run that asks.
    place = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_RANK}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    number, console = len(request["items"]), Console(stderr=True)
    if not console.is_terminal:
        print(
            f"measuring the model: {number} part{'s' * (number > 1)}; the results are cached in {_folder()}",
            file=sys.stderr,
        )
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors, Progress(console=console, transient=True) as bar:
        task = bar.add_task("measuring the model", total=number)
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, encoding="utf-8", cwd=place,
            env=environment,
        ) as child:  # fmt: skip
            assert child.stdin is not None
            assert child.stdout is not None
            try:
                json.dump(request, child.stdin)
                child.stdin.close()
            except BrokenPipeError:
                pass
            for line in child.stdout:
                answer = json.loads(line)
                yield checked(answer)
                bar.advance(task)
        if child.returncode:
            errors.seek(0)
            last = ([line for line in errors.read().splitlines() if line.strip()] or ["no reason given"])[-1]
            raise PlanError(f"the model could not be measured ({' '.join(command[1:])}): {last}")


def checked(answer: Answer) -> Answer:
    """Return the answer of the measuring process.

    Raises:
        PlanError: if the model was refused or could not be measured, with its reason.
    """
    if "refused" in answer:
        raise RefusedModelError(answer["refused"])
    if "error" in answer:
        raise PlanError(answer["error"])
    return answer


@cache
def _versions() -> list[str]:
    def of(library: str) -> str:
        try:
            return f"{library} {version(library)}"
        except PackageNotFoundError:
            return f"no {library}"

    source, root = hashlib.sha256(), Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        if (name := file.relative_to(root)).parts[0] not in _UNMEASURED:
            source.update(str(name).encode() + file.read_bytes())
    return [*map(of, ("torch", "transformers", "diffusers")), source.hexdigest()]
