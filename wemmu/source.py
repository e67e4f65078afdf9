"""A run, a stage or an export, opened to generate images or answers: `wemmu sample` and `wemmu ui` use it.

Both kinds sample with `wemmu.sampling.sampler`: a stage through its recipe, an export through its pipeline.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import ValidationError

from wemmu.command_line import UsageError, exit_code, without_unused
from wemmu.config import StageRun, Task, load_stage, load_stages
from wemmu.config.buckets import RequestSizes, Size, cropped
from wemmu.config.checkpoints import CHECKPOINTS, check_averages, newest_checkpoint, no_checkpoint, stage_folder
from wemmu.config.exported import PARITY
from wemmu.config.files import replacing
from wemmu.config.schema import Sampling
from wemmu.published.check import latent_px
from wemmu.published.layout import BackboneError, read_json
from wemmu.readable import valid
from wemmu.revision import revision
from wemmu.shapes.language import DESCRIBE

if TYPE_CHECKING:
    import torch

    from wemmu.pipeline import WeMMUPipeline
    from wemmu.sampling.request import OnImages, Response

EXPORT = "model_index.json"
# The text chunk of a PNG that holds the settings.
SETTINGS = "wemmu"


@dataclass(frozen=True)
class SampleOptions:
    """What to generate: `count` images of `size` = (height, width) px; None: as the first input image, or square.

    Image i uses seed + i. steps, guidance, image_guidance, solver: None for the model's default.
    """

    prompt: str
    images: tuple[Image.Image, ...]
    size: tuple[int, int] | None
    seed: int
    count: int
    steps: int | None
    guidance: float | None
    image_guidance: float | None
    solver: str | None = None

    @property
    def input_sizes(self) -> list[Size]:
        """(height, width) px of the input images."""
        return [(image.height, image.width) for image in self.images]

    def check(self, draws: bool) -> None:
        """Raise UsageError for a question without an image. draws: see `Source`."""
        if not draws and not self.images:
            raise UsageError("a question needs an image; give one")

    def check_used(self, draws: bool) -> None:
        """Raise UsageError for an option that this request does not use."""
        drawing = ("steps", "solver", "guidance", "image_guidance")
        if not draws and (unused := [name for name in drawing if getattr(self, name) is not None]):
            option = unused[0].replace("_", "-")
            raise UsageError(f"--{option} is for a model that draws; this one answers questions about an image")
        if self.image_guidance is not None and len(self.images) != 1:
            raise UsageError(f"--image-guidance is for a request with one --image; {len(self.images)} were given")
        if self.image_guidance is not None and self.guidance is not None and not self.prompt:
            raise UsageError("without --prompt, --guidance and --image-guidance are the same weight; give one of them")
        if self.guidance is not None and not (self.images or self.prompt):
            raise UsageError("--guidance has nothing to weight; give --prompt, --image or both")

    def weights(self, task: Task) -> dict[str, float]:
        """Return guidance weights under the names of `Sampling`; `guidance` weights the text, if the task has text."""
        name = {Task.EDIT: "instruction", Task.RECONSTRUCTION: "image", Task.MULTI_EDIT: "multi"}.get(task, "t2i")
        given = [("image", self.image_guidance), (name, self.guidance)]
        return {key: value for key, value in given if value is not None}

    def sampling(self, task: Task, default: Sampling) -> Sampling:
        """Return the settings of a model with the changes of these options; the images' own seeds key the noise."""
        changes = {"steps": self.steps, "solver": self.solver, **self.weights(task)}
        given = {name: value for name, value in changes.items() if value is not None}
        try:
            return Sampling(**default.model_dump() | given | {"seed": 0})
        except ValidationError as error:
            first = error.errors()[0]
            name = "guidance" if first["loc"][0] in self.weights(task) else first["loc"][0]
            raise UsageError(f"{name} is {first['input']}: {first['msg'].lower()}") from error


@dataclass(frozen=True)
class Source:
    """An opened model.

    name: for people. origin: stage and step of the weights. resolution: px of its images unless another size is asked
    for; resolutions: px of all stages. sampling: its defaults. draws: whether it makes images of prompts, else it
    answers about images. does: what it does, for people. question: what a VLM is asked if nothing is asked. respond:
    one response for each of the `count` seeds of options that passed `check`. sizes: how it sizes images; None: inputs
    are cropped to the size of the output.
    """

    name: str
    origin: Mapping[str, Any]
    world: str | None
    resolution: int
    resolutions: Sequence[int]
    sampling: Sampling
    draws: bool
    does: str
    respond: "Callable[[SampleOptions, OnImages | None], list[Response]]"
    question: str = ""
    sizes: RequestSizes | None = None

    def sizes_of(self, options: SampleOptions) -> tuple[Size, list[Size]]:
        """Return (height, width) px of the output and of each input image."""
        if self.sizes:
            return self.sizes.of(options.input_sizes, options.size)
        size = options.size or (self.resolution, self.resolution)
        return size, [size] * len(options.images)

    def warnings(self, options: SampleOptions) -> Iterator[str]:
        """Yield a warning for each property of the options that training did not cover."""
        from wemmu.pipeline import beyond

        size, own = self.sizes_of(options)
        yield from beyond(self.world, self.resolutions, [options.prompt], size)
        yield from cropped(options.input_sizes, own)

    def settings(self, options: SampleOptions, number: int = 0) -> dict[str, Any]:
        """Return all that makes image `number` again, for its metadata."""
        from wemmu.sampling.guidance import guidance_weights
        from wemmu.sampling.request import task_of

        task = task_of(options.prompt, len(options.images)) if self.draws else Task.UNDERSTANDING
        sampling, commit = options.sampling(task, self.sampling), revision()
        weights = guidance_weights(task, sampling) if self.draws else {}
        return {
            "model": self.name,
            **self.origin,
            "commit": commit.commit if commit else None,
            "task": str(task),
            "prompt": options.prompt,
            "inputs": [hashlib.sha256(image.tobytes()).hexdigest() for image in options.images],
            "size": list(self.sizes_of(options)[0]),
            "seed": options.seed + number,
            "steps": sampling.steps,
            "solver": sampling.solver,
            "guidance": {branch.name.lower(): weight for branch, weight in weights.items()},
        }


def save_image(image: Image.Image, file: Path, settings: Mapping[str, Any]) -> None:
    """Write an image in the format of its suffix, whole or not at all; a PNG carries the settings that made it."""
    form, encoded = Image.registered_extensions()[file.suffix.lower()], BytesIO()
    # In memory first: Pillow's errors of a full disk have no number.
    image.save(encoded, form)
    with replacing(file) as aside:
        aside.write_bytes(png(image, settings) if form == "PNG" else encoded.getvalue())


def png(image: Image.Image, settings: Mapping[str, Any]) -> bytes:
    """Return a PNG file that contains the settings of the image."""
    info, file = PngInfo(), BytesIO()
    info.add_text(SETTINGS, json.dumps(settings))
    image.save(file, "PNG", pnginfo=info)
    return file.getvalue()


def settings_of(image: Image.Image) -> dict[str, Any] | None:
    """Return the settings in an image that `png` wrote; None for any other."""
    text = image.info.get(SETTINGS)
    return json.loads(text) if text else None


def open_source(source: Path, ema: bool | None = None, device: str | None = None) -> Source:
    """Load `source`. ema: whether to use the moving average of the weights; None: if the stage keeps one.

    device: None uses a GPU if there is one.

    Raises:
        ConfigError: if `source` is not a run, a stage or an export, or its config is invalid.
    """
    exported = _exported if (source / EXPORT).is_file() else _exported_vlm if is_tuned_vlm(source) else None
    if exported is not None:
        if ema is not None:
            raise UsageError(f"{source} is an export, which has one set of weights; --ema is for RUN and RUN/STAGE")
        return exported(source, choose_device(device))
    stage = stage_folder(source)
    return _stage(load_stage(stage / "config.yaml"), stage, ema, choose_device(device))


def check_request(source: Path, options: SampleOptions, ema: bool | None = None) -> None:
    """Refuse, before weights are loaded, what the small files of a model exclude.

    Raises:
        UsageError: names the option and what is valid. ConfigError: as `open_source`.
    """
    from wemmu.sampling.request import request_sizes

    solvers = get_args(Sampling.model_fields["solver"].annotation)
    if options.solver is not None and options.solver not in solvers:
        raise UsageError(f"--solver {options.solver} is unknown; {valid(options.solver, solvers)}")
    draws, table, vlm, vae = True, 0, source / "vlm", source / "vae"
    if (source / EXPORT).is_file():
        index, bridge = read_json(source / EXPORT), read_json(source / "bridge" / "config.json")["bridge"]
        side, aspect, table = index.get("resolution"), index.get("max_aspect", 2.0), bridge["position_table"]
    elif is_tuned_vlm(source):
        draws = False
    else:
        stage = stage_folder(source)
        run = load_stage(stage / "config.yaml")
        check_averages(newest_checkpoint(stage), run.stage.averages(ema))
        draws, vlm, vae = run.recipe.draws, run.backbones.vlm, run.backbones.vae or vae
        side, aspect = run.stage.resolution, run.data.max_aspect
        table = run.recipe.position_table
    options.check(draws)
    options.check_used(draws)
    # An export without its VLM is refused when it is opened.
    if table and side and options.size and (vlm / "config.json").is_file():
        vision = read_json(vlm / "config.json")["vision_config"]
        token = vision["patch_size"] * vision["spatial_merge_size"]
        if problem := request_sizes(side, aspect, table, token, latent_px(vae)).problem(options.size):
            raise UsageError(f"--size: {problem}")


def open_pipeline(directory: Path, **options: Any) -> "WeMMUPipeline":
    """Load an export. options: of `from_pretrained`. Raises BackboneError if a file is missing or damaged."""
    if not (directory / EXPORT).is_file():
        raise BackboneError(
            f"{directory} is not an export (it has no {EXPORT}); `wemmu export RUN --out DIR` writes one"
        )
    with without_unused():
        from wemmu.pipeline import WeMMUPipeline

    try:
        return WeMMUPipeline.from_pretrained(directory, **options)
    except Exception as error:
        # What the libraries raise of half a folder: OSError without a number, ValueError, TypeError, ...
        if exit_code(error) is not None or isinstance(error, MemoryError):
            raise
        raise BackboneError(
            f"{directory} cannot be loaded as a pipeline: {error}; copy all of the export, or export the run again"
        ) from error


def is_tuned_vlm(directory: Path) -> bool:
    """Return whether it is an exported VLM: a VLM's directory with the report of the export."""
    return (directory / "config.json").is_file() and (directory / PARITY).is_file()


def choose_device(name: str | None) -> "torch.device":
    """Raise UsageError if there is no such device here."""
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return device


def _stage(run: StageRun, folder: Path, ema: bool | None, device: "torch.device") -> Source:
    import torch

    from wemmu.checkpoint.retention import latest
    from wemmu.config.checkpoints import step_of
    from wemmu.pixels import fitted, on_canvas

    with without_unused():
        from wemmu.pipeline import check_size
        from wemmu.sampling.request import GenerationRequest, task_of
        from wemmu.training.build import load_trained

    if (checkpoint := latest(folder / CHECKPOINTS)) is None:
        raise no_checkpoint(folder)
    if run.threads is not None:
        torch.set_num_threads(run.threads)
    made = load_trained(run, checkpoint, ema, device)
    resolutions = sorted({stage.stage.resolution for _, stage in load_stages(folder.resolve().parent)})

    def request_of(task: Task, options: SampleOptions) -> GenerationRequest:
        (size, own), seeds = source.sizes_of(options), torch.arange(options.seed, options.seed + options.count)
        images, sizes = on_canvas([[*map(fitted, options.images, own)]] * options.count, size)
        return GenerationRequest(task, [options.prompt] * options.count, images, size, seeds, sizes=sizes)

    def draw(options: SampleOptions, on_images: "OnImages | None") -> "list[Response]":
        task = task_of(options.prompt, len(options.images))
        for line in source.warnings(options):
            print(line, file=sys.stderr)
        if source.sizes is not None:
            check_size(source.sizes_of(options)[0], source.sizes)
        return made.respond(request_of(task, options), options.sampling(task, run.sampling), on_images)

    question = run.recipe.asks_for_captions or DESCRIBE

    def answer(options: SampleOptions, _: "OnImages | None") -> "list[Response]":
        return made.respond(request_of(Task.UNDERSTANDING, replace(options, prompt=options.prompt or question)))

    source = Source(
        name=str(folder),
        origin={"stage": run.stage.name, "step": step_of(checkpoint)},
        world=run.world,
        resolution=run.stage.resolution,
        resolutions=resolutions,
        sampling=run.sampling,
        draws=run.recipe.draws,
        does=run.recipe.does,
        question=question,
        respond=draw if run.recipe.draws else answer,
        sizes=made.sizes,
    )
    return source


def _exported(directory: Path, device: "torch.device") -> Source:
    from wemmu.pixels import to_images

    with without_unused():
        from wemmu.backbones.vae import FrozenVAE
        from wemmu.sampling.request import Response, task_of

    pipe = open_pipeline(directory).to(device)
    pipe.set_progress_bar_config(disable=not sys.stderr.isatty())

    def draw(options: SampleOptions, on_images: "OnImages | None") -> list[Response]:
        def on_step(_: Any, index: int, __: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_images:
                on_images(index, lambda: to_images(FrozenVAE(pipe.vae).decode(tensors["estimate"])))
            return {}

        height, width = options.size or (None, None)
        weights: dict[str, Any] = {
            f"{name}_guidance_scale": value
            for name, value in options.weights(task_of(options.prompt, len(options.images))).items()
        }
        images = pipe(
            [options.prompt] * options.count,
            image=[list(options.images)] * options.count,
            height=height,
            width=width,
            num_inference_steps=options.steps,
            solver=options.solver,
            seed=options.seed,
            callback_on_step_end=on_step,
            callback_on_step_end_tensor_inputs=["estimate"],
            **weights,
        ).images
        return [Response(image) for image in images]

    report = directory / PARITY
    origin = read_json(report).get("origin", {}) if report.is_file() else {}
    return Source(
        name=str(directory),
        origin={name: origin[name] for name in ("stage", "step") if name in origin},
        world=pipe.config["world"],
        resolution=pipe.config["resolution"],
        resolutions=pipe.config["resolutions"],
        sampling=pipe.sampling(),
        draws=True,
        does="generates and edits images",
        respond=draw,
        sizes=pipe.request_sizes,
    )


def _exported_vlm(directory: Path, device: "torch.device") -> Source:
    """A tuned VLM without what the training had beside it; shown with an answer is the image that was asked about."""
    import torch

    from wemmu.images import fit
    from wemmu.pixels import fitted

    with without_unused():
        from wemmu.recipes.tuned_vlm import ExportedVLM
        from wemmu.sampling.request import GenerationRequest, Response

    vlm = ExportedVLM(directory, device)
    side = int(vlm.origin["resolution"])

    def answer(options: SampleOptions, _: "OnImages | None") -> list[Response]:
        size = options.size or (side, side)
        images, ids = torch.stack([fitted(i, size) for i in options.images])[None], torch.tensor([options.seed])
        request = GenerationRequest(Task.UNDERSTANDING, [options.prompt or vlm.question], images, size, ids)
        return [Response(fit(options.images[0], *size), words) for words in vlm.answers(request)] * options.count

    return Source(
        name=str(directory),
        origin={name: vlm.origin[name] for name in ("stage", "step")},
        world=None,
        resolution=side,
        resolutions=[side],
        sampling=Sampling(),
        draws=False,
        does="answers about an image; the run beside it also makes the image again",
        question=vlm.question,
        respond=answer,
    )
