"""The options of each benchmark: what it reads from disk and which judges it uses. docs/evaluation.md explains them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, ConfigDict, Field, HttpUrl, TypeAdapter, ValidationError
from typing_extensions import TypedDict
from yaml import YAMLError

from wemmu.config.base import Config, ConfigError, LocalPath, Positive, Seed, SidePx, leaves
from wemmu.config.files import check_yaml
from wemmu.config.messages import faults
from wemmu.config.task import Task
from wemmu.readable import valid

Encoder = Literal["clip", "longclip", "dinov2", "dinov3"]


# The file of a result card.
CARD = "card.json"
# In a stage's folder: the scores of its evaluation, the benchmark's folder, and in this the first requests.
RESULTS, EVALUATION, SAMPLES = "evaluation.json", "evaluation", "samples.json"


class BenchmarkOptions(Config):
    """seed: key of the noise of every request. batch: images generated at a time. resamples: of the bootstrap."""

    seed: Seed = 0
    batch: Positive = 16
    resamples: Annotated[Positive, Field(le=10**6)] = 1000


class ShapesOptions(BenchmarkOptions):
    """The miniature's exact scores: `prompts` held-out requests of each task.

    splits: scenes that are never trained on; pairs of colour and shape that are never trained on, half as many.
    """

    prompts: Annotated[Positive, Field(le=10**6)] = 100
    splits: tuple[Literal["test", "composition"], ...] = ("test",)
    tasks: tuple[Task, ...] = (Task.T2I, Task.RECONSTRUCTION, Task.EDIT, Task.MULTI_EDIT)


class FidelityOptions(BenchmarkOptions):
    """Held-out records of a data set, without a judge. shards: else the run's. encoders: name -> folder, may be none.
    lpips: torchvision's weights of AlexNet or VGG-16, for LPIPS.

    records: at most so many of each stream. validation: how many records of a stream are held out, else the run's.
    """

    shards: LocalPath | None = None
    validation: Positive | None = None
    resolution: SidePx | None = None
    records: Positive = 100
    tasks: tuple[Task, ...] = (Task.RECONSTRUCTION, Task.EDIT)
    encoders: dict[str, LocalPath] = Field(default_factory=dict)
    lpips: LocalPath | None = None


class UnifiedBenchOptions(BenchmarkOptions):
    """data: the folder of images. encoders: clip, longclip, dinov2, dinov3 -> folder; Unified-Score needs all four.

    captions: a file of lines {"image": NAME, "caption": TEXT}; the model generates from the caption alone, which is the
    benchmark. Without it the model reconstructs from the image, and the score is named so.
    """

    data: LocalPath
    encoders: Annotated[dict[Encoder, LocalPath], Field(min_length=1)]
    captions: LocalPath | None = None


class GenEvalOptions(BenchmarkOptions):
    """data: the folder with evaluation_metadata.jsonl and object_names.txt. detector: a Mask2Former; clip: for colours.

    images: of each prompt.
    """

    data: LocalPath
    detector: LocalPath
    clip: LocalPath
    images: Annotated[Positive, Field(le=10**6)] = 4


def _http(url: str) -> str:
    TypeAdapter(HttpUrl).validate_python(url)
    return url


class ServerOptions(Config):
    """An OpenAI-compatible server. url: ends before /chat/completions. key_env: environment variable with the key.

    cache: the file that keeps every answer. attempts: per question, with growing pauses.
    """

    url: Annotated[str, AfterValidator(_http)]
    model: str
    key_env: str = "OPENAI_API_KEY"
    cache: LocalPath = Path("judge-answers.jsonl")
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    attempts: Positive = 4
    concurrent: Annotated[Positive, Field(le=1024)] = 4
    max_tokens: Positive = 1024


class DPGOptions(BenchmarkOptions):
    """data: the folder with dpg_bench.csv. images: of each prompt."""

    data: LocalPath
    judge: ServerOptions
    images: Annotated[Positive, Field(le=10**6)] = 4


class ImgEditOptions(BenchmarkOptions):
    """data: the folder with basic_edit.json and prompts.json. images: the folder of the input images."""

    data: LocalPath
    images: LocalPath
    judge: ServerOptions


class WISEOptions(BenchmarkOptions):
    """data: a checkout, with gpt_eval.py and the three files of data/."""

    data: LocalPath
    judge: ServerOptions


class GEditOptions(BenchmarkOptions):
    """data: folder of parquet or arrow files. viescore: folder of vie_prompts.py. language: of the instructions."""

    data: LocalPath
    viescore: LocalPath
    language: Literal["en", "cn"] = "en"
    judge: ServerOptions


class UnifiedBenchCaptionsOptions(BenchmarkOptions):
    """data: the folder of images. captions, rivals: files of lines {"image": NAME, "caption": TEXT}, one a model."""

    data: LocalPath
    captions: LocalPath
    # Their names are part of file names.
    rivals: Annotated[dict[Annotated[str, Field(pattern=r"^[\w.\-]+$")], LocalPath], Field(min_length=1)]
    judge: ServerOptions


class Benchmarks(TypedDict, total=False):
    """Benchmarks of stages with their options, by name."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    shapes: ShapesOptions
    fidelity: FidelityOptions
    unified_bench: UnifiedBenchOptions
    geneval: GenEvalOptions
    dpg: DPGOptions
    wise: WISEOptions
    imgedit: ImgEditOptions
    gedit: GEditOptions


# Those that a stage can name.
_OF_STAGES = {name: kind for name, kind in get_type_hints(Benchmarks).items() if not name.startswith("_")}
OPTIONS: dict[str, type[BenchmarkOptions]] = _OF_STAGES | {"unified_bench_captions": UnifiedBenchCaptionsOptions}
if TYPE_CHECKING:
    BenchmarkName = str
else:
    BenchmarkName = Literal[tuple(_OF_STAGES)]


def check_card(given: Path) -> None:
    """Raise ConfigError if `given` is neither a result card nor the folder of one; names those inside."""
    if not (given if given.name == CARD else given / CARD).is_file():
        inside = sorted(
            str(card.parent) for pattern in ("*", "*/*", "*/*/*") for card in given.glob(f"{pattern}/{CARD}")
        )
        meant = f"valid inside it: {', '.join(inside)}" if inside else "`wemmu evaluate` writes one"
        raise ConfigError(f"{given} holds no result card ({CARD}); {meant}")


def card_folder(stage_folder: Path, name: str) -> Path:
    """Return the folder of a stage's benchmark."""
    return stage_folder / "benchmarks" / name


def card_file(stage_folder: Path, name: str) -> Path:
    """Return the result card of a stage's benchmark."""
    return card_folder(stage_folder, name) / CARD


def inputs(options: BenchmarkOptions) -> dict[str, Path]:
    """Return the folders and files that a benchmark reads: dotted name of the option -> path."""
    found = leaves(options.model_dump())
    return {name: value for name, value in found if isinstance(value, Path) and name != "judge.cache"}


def options(name: str, values: Mapping[str, Any]) -> BenchmarkOptions:
    """Return the checked options of a benchmark.

    Raises:
        ConfigError: for an unknown benchmark, or names every invalid option and the valid ones.
    """
    if name not in OPTIONS:
        raise ConfigError(f"no benchmark is called {name!r}; {valid(name, OPTIONS, 'valid choices')}")
    try:
        return OPTIONS[name].model_validate(values)
    except ValidationError as error:
        found, options = "; ".join(faults(error, OPTIONS[name], values)), ", ".join(OPTIONS[name].model_fields)
        raise ConfigError(f"benchmark {name}: {found}. Options (--set NAME=VALUE): {options}") from error


def from_pairs(pairs: Sequence[str]) -> dict[str, Any]:
    """Parse `encoders.clip=DIR`, ... into nested values, read as YAML; the last value of an option counts.

    Raises:
        ConfigError: for a pair of another form.
    """
    try:
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not name or not equals:
                raise ConfigError(f"the option {pair!r} is not of the form NAME=VALUE")
            check_yaml(f"the option {name} cannot be read", value)
        found = OmegaConf.to_container(OmegaConf.from_dotlist(list(pairs)))
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"the options {', '.join(pairs)} cannot be read: {error}") from error
    return cast(dict[str, Any], found)
