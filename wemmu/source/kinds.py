"""How each kind of source is opened: a stage, an exported pipeline, an exported VLM."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wemmu.command_line import exit_code, without_unused
from wemmu.config import StageRun, Task, load_stages
from wemmu.config.checkpoints import CHECKPOINTS, no_checkpoint
from wemmu.config.exported import PARITY
from wemmu.config.schema import Sampling
from wemmu.published.layout import BackboneError, read_json
from wemmu.shapes.language import DESCRIBE
from wemmu.source.opened import Source
from wemmu.source.options import SampleOptions

if TYPE_CHECKING:
    import torch

    from wemmu.pipeline import WeMMUPipeline
    from wemmu.sampling.request import OnImages, Response

EXPORT = "model_index.json"


def open_stage(folder: Path, run: StageRun, ema: bool | None, device: "torch.device") -> Source:
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


def open_export(directory: Path, device: "torch.device") -> Source:
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


def open_exported_vlm(directory: Path, device: "torch.device") -> Source:
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
