"""One protocol for all benchmarks: which images to generate, how to judge one, what the scores are."""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from wemmu.config import ConfigError, StageRun
from wemmu.config.benchmarks import OPTIONS
from wemmu.config.task import Task
from wemmu.images import decode, to_rgb
from wemmu.readable import valid
from wemmu.sampling.request import task_of

# What `title_of` returns.
_PARTIAL = re.compile(r"^partial (.+) \(.*\)$")


class BenchmarkError(ConfigError):
    """A benchmark that cannot run or be compared; the message says why, and what to do."""


@dataclass(frozen=True)
class BenchmarkRequest:
    """One image to generate.

    key: its file's name without suffix, unique and stable. unit: requests of one unit are one draw of the bootstrap:
    the images of one prompt. seed: the key of its noise. size: (height, width) px; None for the model's own.
    facts: what the judge needs, of JSON's types. given_task: by default, text and images determine it.
    """

    key: str
    text: str
    category: str
    unit: str
    seed: int
    images: tuple[Image.Image, ...] = ()
    size: tuple[int, int] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    given_task: Task | None = None

    @property
    def task(self) -> Task:
        return self.given_task or task_of(self.text, len(self.images))


class Mark(NamedTuple):
    """The verdict on one image: measure -> value; None if the judge gave no answer."""

    key: str
    category: str
    unit: str
    values: Mapping[str, float | None]


class Judged(NamedTuple):
    """What a judge sees. words: the answer of a model that also writes."""

    request: BenchmarkRequest
    image: Image.Image
    words: str = ""


class Benchmark(ABC):
    """A benchmark with its options; constructing it reads its files and loads no judge.

    title: for people. generates: whether a model makes the images, else they are those of a folder.
    """

    title: str
    generates = True

    @abstractmethod
    def __init__(self, options: Any, run: StageRun | None) -> None:
        """run: the config of the stage that is scored; None for an export.

        Raises:
            BenchmarkError: for missing or invalid files; names the repository that has them.
        """

    @abstractmethod
    def files(self) -> Mapping[str, Path]:
        """Return name -> published file that was read; the card records its hash."""

    @abstractmethod
    def requests(self) -> Sequence[BenchmarkRequest]: ...

    def adopt(self, folder: Path) -> Mapping[str, Path]:
        """Return key -> image of a folder that another program wrote in the published layout; by default KEY.png.

        Raises:
            BenchmarkError: if images are missing.
        """
        return adopted({request.key: folder / f"{request.key}.png" for request in self.requests()})

    @abstractmethod
    def judges(self) -> Mapping[str, Any]:
        """Return who judges, with versions or hashes, for the card."""

    @abstractmethod
    def judge(self, images: Iterable[Judged]) -> Iterator[Mapping[str, float | None]]:
        """Yield measure -> value of each image, in order."""

    @staticmethod
    @abstractmethod
    def headline(marks: Sequence[Mark]) -> dict[str, float]:
        """Return name -> score over all marks, the most important first; what cannot be computed is left out."""


def benchmark_class(name: str) -> type[Benchmark]:
    """Return the class of a benchmark.

    Raises:
        BenchmarkError: for an unknown name.
    """
    if name not in OPTIONS:
        raise BenchmarkError(f"no benchmark is called {name!r}; {valid(name, OPTIONS, 'valid choices')}")
    found: type[Benchmark] = import_module(f"wemmu.evaluation.{name}.benchmark").BENCHMARK
    return found


def adopted(files: Mapping[str, Path]) -> dict[str, Path]:
    """Return these files; raises BenchmarkError if some are missing."""
    if missing := [file for file in files.values() if not file.is_file()]:
        raise BenchmarkError(f"{len(missing)} of {len(files)} images are missing, the first is {missing[0]}")
    return dict(files)


def mean_of(marks: Iterable[Mark], measure: str) -> float | None:
    """Return the mean of a measure over the marks that have it; None if none has."""
    values = [value for mark in marks if (value := mark.values.get(measure)) is not None]
    return sum(values) / len(values) if values else None


def by_category(marks: Sequence[Mark], measure: str) -> dict[str, float]:
    """Return category -> mean of a measure, in the marks' order, without categories that have none."""
    groups: dict[str, list[Mark]] = {}
    for mark in marks:
        groups.setdefault(mark.category, []).append(mark)
    means = {name: mean_of(group, measure) for name, group in groups.items()}
    return {name: value for name, value in means.items() if value is not None}


def title_of(score: str, marks: Sequence[Mark], measure: str, categories: Sequence[str] = ()) -> str:
    """Return the name of a score, or one that says what it lacks: images without a verdict, or whole categories."""
    lacking = []
    if failed := sum(mark.values.get(measure) is None for mark in marks):
        lacking.append(f"{failed} of {len(marks)} not judged")
    if categories and (present := len(set(categories) & by_category(marks, measure).keys())) < len(categories):
        lacking.append(f"{present} of {len(categories)} categories")
    return f"partial {score} ({', '.join(lacking)})" if lacking else score


def plain(title: str) -> str:
    """Return the name of a score without what it lacks."""
    return _PARTIAL.sub(r"\1", title)


def published(folder: Path, name: str, repository: str, inside: str = "") -> Path:
    """Return a published file. inside: its folder in a checkout of the repository.

    Raises:
        BenchmarkError: if it is missing; names the repository that has it.
    """
    folder = folder / inside if inside and (folder / inside).is_dir() else folder
    if not (folder / name).is_file():
        raise BenchmarkError(f"{folder / name} is missing; {repository} publishes it: put it there as it is")
    return folder / name


def published_text(file: Path, repository: str) -> str:
    """Read a published text file; raises BenchmarkError if it is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeError as error:
        raise BenchmarkError(f"{file} is not UTF-8: {error}; {repository} has it") from error


def open_image(name: Path | str, data: bytes) -> Image.Image:
    """Return an image file as RGB; raises BenchmarkError with its `name` if it is none."""
    try:
        return to_rgb(decode(data))
    # Anything at all: on damaged files Pillow's readers raise OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise BenchmarkError(f"{name} cannot be read as an image: {error}") from error


def read_json(file: Path, form: type, repository: str) -> Any:
    """Read a published JSON file.

    Raises:
        BenchmarkError: if it holds anything but `form`, a list or a dict.
    """
    try:
        found = json.loads(published_text(file, repository))
    except ValueError as error:
        raise BenchmarkError(f"{file} is not JSON: {error}; {repository} has it") from error
    if not isinstance(found, form):
        raise BenchmarkError(f"{file} holds no JSON {form.__name__}; {repository} has it")
    return found
