"""The pipeline: its components, a call, and the file in which diffusers finds its class."""

import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.models import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.utils import logging
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from wemmu.backbones.adapters import adapter_of
from wemmu.backbones.precision import keep_float32_buffers
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.versions import rope_theta
from wemmu.backbones.vlm import FrozenVLM
from wemmu.config.buckets import RequestSizes, Size, cropped
from wemmu.config.exported import ARGUMENTS
from wemmu.config.prepare import ImageSizing
from wemmu.config.schema import Sampling
from wemmu.pipeline.arguments import (
    OUTPUT_TYPES,
    Images,
    beyond,
    check_size,
    first,
    output,
    repeated,
    requests,
    sampling_of,
    seeds,
)
from wemmu.prompts import PromptEncoder
from wemmu.readable import valid
from wemmu.recipes.wemmu import component
from wemmu.recipes.wemmu.component import WeMMUBridge
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.sampling.request import grouped, request_sizes
from wemmu.sampling.sampler import Sampler
from wemmu.sampling.solvers import SOLVERS, OnStep, Solver, Step, keep
from wemmu.timesteps import VelocityField, shift_time

logger = logging.get_logger(__name__)
# The module that earlier exports name in model_index.json.
sys.modules["wemmu.models.component"] = component
# Arguments of `__init__` besides the components.
_DEFAULTS = ("resolution", *ARGUMENTS.values(), "resolutions", "world", "max_aspect")
PIPELINE_FILE = '''\
"""The pipeline for diffusers' custom_pipeline; the wemmu package must be installed."""

from wemmu.pipeline import WeMMUPipeline

__all__ = ["WeMMUPipeline"]
'''


class WeMMUPipeline(DiffusionPipeline):
    """Text, images or both -> images.

    resolution: side in px of the last stage's images; resolutions: of all its stages. world: see `beyond`. The other
    numbers are the defaults of a call; `Sampling` in `wemmu.config.schema` explains them. max_aspect: of the images of
    training, longer to shorter side.
    """

    # An export may leave out the VLM, which training never changes; it must then be given when loading.
    _optional_components = ["vlm"]  # noqa: RUF012  # as diffusers declares it
    model_cpu_offload_seq: Any = "vlm->bridge->transformer->vae"
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents", "estimate"]

    def __init__(
        self,
        vlm: PreTrainedModel | None,
        processor: ProcessorMixin,
        transformer: ModelMixin,
        vae: ModelMixin,
        scheduler: FlowMatchEulerDiscreteScheduler,
        bridge: WeMMUBridge,
        resolution: int = 1024,
        num_inference_steps: int = 20,
        t2i_guidance_scale: float = 4.0,
        image_guidance_scale: float = 2.0,
        instruction_guidance_scale: float = 3.0,
        multi_guidance_scale: float = 3.0,
        resolutions: list[int] | tuple[int, ...] = (),
        world: str | None = None,
        solver: str = "euler",
        max_aspect: float = ImageSizing().max_aspect,
    ):
        given = dict(locals())
        super().__init__()
        _check_layers(vlm, bridge)
        for part in (vlm, transformer):
            assert part is not None
            keep_float32_buffers(part)
        self.register_modules(
            vlm=vlm, processor=processor, transformer=transformer, vae=vae, scheduler=scheduler, bridge=bridge
        )
        self.register_to_config(**{name: given[name] for name in _DEFAULTS} | {"resolutions": list(resolutions)})

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """Save as diffusers does, with the file in which diffusers finds this class."""
        super().save_pretrained(save_directory, *args, **kwargs)
        write_entry(Path(save_directory))

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as diffusers does; this class needs no file to be found in (see `write_entry`)."""
        config = super().load_config(*args, **kwargs)
        if isinstance(config, dict) and isinstance(config.get("_class_name"), list):
            config = config | {"_class_name": config["_class_name"][-1]}
        return config

    @property
    def components(self) -> dict[str, Any]:
        """All that makes another pipeline like this one: `WeMMUPipeline(**pipe.components)`."""
        defaults = {name: self.config[name] for name in _DEFAULTS}
        return super().components | defaults

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = "",
        image: Images | Sequence[Images] = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        t2i_guidance_scale: float | None = None,
        image_guidance_scale: float | None = None,
        instruction_guidance_scale: float | None = None,
        multi_guidance_scale: float | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "pil",
        negative_prompt: str | Sequence[str] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        solver: str | None = None,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_dict: bool = True,
    ) -> Any:
        """Make `num_images_per_prompt` images for each prompt, those of one prompt beside each other.

        A request without images is text to image, with one image an edit (without text: a reconstruction), with
        several an edit that combines them; one call may mix requests of different kinds.

        Args:
            prompt: one text, or a list with one for each image to make; None: no text.
            image: for one text, its input image or the list of its input images; for a list of texts, a list with such
                an entry, or None, for each. PIL images, paths, bytes, files in memory, arrays [H, W, C] and tensors
                [C, H, W] will do. Each keeps its aspect ratio and gets as many pixels as the output; what exceeds the
                nearest size in the autoencoder's steps is cropped evenly.
            height, width: px of the output, multiples of the autoencoder's factor. Without both, it has the aspect
                ratio of the first input image, or is square, and as many pixels as in training; without one, that one
                is the resolution. The side of the bridge's position table bounds them.
            num_inference_steps: steps of the scheduler.
            t2i_guidance_scale: weight of the text, in text to image.
            image_guidance_scale: weight of the image, in an edit or a reconstruction.
            instruction_guidance_scale: weight of the instruction, in an edit.
            multi_guidance_scale: weight of everything given, in an edit of several images.
            seed: image i is a function of its request and of `seed` + i alone, or of `seed[i]` if it is a list.
            generator: draws the seeds instead; one, or one for each image. Without either, torch's global one does.
            output_type: "pil"; "pt", [B, 3, H, W] in [0, 1]; "np", [B, H, W, 3] in [0, 1]; or "latent", [B, C, h, w].
            negative_prompt: what the guidance of the text leads away from; one text, or one for each prompt.
            guidance_scale: the guidance scale of the text, whatever the kind of request.
            solver: "euler", which is the scheduler, or "heun" with two evaluations a step.
            callback_on_step_end: called after each step with this pipeline, the step's index, its timestep and a dict
                with the tensors of `callback_on_step_end_tensor_inputs`: "latents", and "estimate", the latents that
                the step aims at. The solver goes on from the "latents" of the dict it returns. Requests of different
                kinds are solved one kind after the other.
            return_dict: whether to return an `ImagePipelineOutput`, with `images`, else a tuple.

        Raises:
            ValueError: if the arguments do not fit each other or the model; names the valid ones.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; {valid(output_type, OUTPUT_TYPES, 'valid choices')}")
        texts, inputs, negatives = repeated(num_images_per_prompt, *requests(prompt, image, negative_prompt))
        sizes = self._sizes(texts, inputs, height, width)
        keys = seeds(seed, generator, len(texts))
        sampling = self.sampling(
            steps=num_inference_steps,
            solver=solver,
            t2i=first(t2i_guidance_scale, guidance_scale),
            image=image_guidance_scale,
            instruction=first(instruction_guidance_scale, guidance_scale),
            multi=first(multi_guidance_scale, guidance_scale),
        )
        sampler = self._sampler()
        on_step = self._on_step(callback_on_step_end, callback_on_step_end_tensor_inputs)
        draw = sampler.latents if output_type == "latent" else sampler
        made: dict[int, Tensor] = {}
        device, dtype = self._execution_device, self.transformer.dtype
        for members, request in grouped(texts, inputs, sizes, keys, negatives):
            with torch.autocast(device.type, dtype, dtype != torch.float32):
                made |= zip(members, draw(request, sampling, on_step), strict=True)
        if not all(image.isfinite().all() for image in made.values()):
            raise ValueError(
                "the generated images are not finite: weights of this export are infinite or NaN, or a guidance scale "
                f"is too large ({sampling.model_dump(include=set(ARGUMENTS) - {'steps', 'solver'})})"
            )
        self.maybe_free_model_hooks()
        found: Any = output([made[i] for i in range(len(texts))], output_type)
        return ImagePipelineOutput(images=found) if return_dict else (found,)

    def _on_step(self, callback: Callable[..., dict[str, Any]] | None, names: Sequence[str]) -> OnStep:
        """A callback of diffusers for the solver."""
        if callback is None:
            return keep
        # An object of diffusers says itself which tensors it takes.
        names = getattr(callback, "tensor_inputs", names)
        if unknown_names := set(names) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs has {', '.join(sorted(unknown_names))}; valid choices: "
                f"{', '.join(self._callback_tensor_inputs)}"
            )

        def on_step(step: Step) -> Tensor:
            tensors = {"latents": step.x, "estimate": step.estimate}
            timestep = torch.tensor(step.t * self.scheduler.config.num_train_timesteps)
            changed = callback(self, step.index, timestep, {name: tensors[name] for name in names})
            return (changed or {}).get("latents", step.x)

        return on_step

    def sampling(self, **given: Any) -> Sampling:
        """Return the settings of a call: this pipeline's defaults, and what is given under the names of `Sampling`."""
        return sampling_of({name: self.config[argument] for name, argument in ARGUMENTS.items()}, given)

    @property
    def request_sizes(self) -> RequestSizes:
        """Return how the images of a request are sized."""
        pixels = self.processor.image_processor
        return request_sizes(
            self.config["resolution"],
            self.config["max_aspect"],
            self.bridge.position_mlp.table.shape[0],
            pixels.patch_size * pixels.merge_size,
            adapter_of(self.vae).geometry(self.vae)[1],
        )

    def _sizes(
        self,
        texts: Sequence[str],
        inputs: Sequence[Sequence[Image.Image]],
        height: int | None,
        width: int | None,
    ) -> list[tuple[Size, list[Size]]]:
        """Return the sizes of each request's output and inputs; warn of what training did not cover."""
        rules, found = self.request_sizes, []
        requested = None if height is width is None else (first(height, rules.side), first(width, rules.side))
        check_size(requested or (rules.side, rules.side), rules)
        warnings: dict[str, None] = {}
        for text, images in zip(texts, inputs, strict=True):
            given = [(image.height, image.width) for image in images]
            size, own = rules.of(given, requested)
            found.append((size, own))
            warnings |= dict.fromkeys(beyond(self.config["world"], self.config["resolutions"], [text], size))
            warnings |= dict.fromkeys(cropped(given, own))
        for line in warnings:
            logger.warning(line)
        return found

    def _sampler(self) -> Sampler:
        """Return a sampler over the current components, which may have been replaced or moved since the last call."""
        if not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            raise ValueError(
                f"the scheduler is of the class {type(self.scheduler).__name__}; the model was trained for flow "
                "matching, so it must be a FlowMatchEulerDiscreteScheduler"
            )
        pixels = self.processor.image_processor
        vlm = FrozenVLM(self.vlm, pixels.image_mean, pixels.image_std)
        # Not the VLM itself: where components are offloaded, their hooks move them.
        vlm.mean, vlm.std = vlm.mean.to(self._execution_device), vlm.std.to(self._execution_device)
        if hook := getattr(self.vlm, "_hf_hook", None):
            # It waits for `vlm.forward`, and only parts of the VLM are called.
            hook.pre_forward(self.vlm)
        model = WeMMU(vlm, FrozenVAE(self.vae), self.bridge, self.transformer)
        # Evenly spaced times, for the scheduler shifts them itself.
        solvers = {name: _shifted(solver, self.scheduler.config.shift) for name, solver in SOLVERS.items()}
        solvers["euler"] = scheduler_solver(self.scheduler, self.progress_bar)
        return Sampler(model, PromptEncoder(self.processor), 1.0, solvers, self._execution_device)


def scheduler_solver(
    given: FlowMatchEulerDiscreteScheduler, progress: Callable[[Iterable[Tensor]], Iterable[Tensor]]
) -> Solver:
    """Wrap a scheduler of diffusers as a `Solver`; `progress` wraps its time steps."""

    def solve(velocity: VelocityField, x: Tensor, ts: Tensor, on_step: OnStep = keep) -> Tensor:
        # One of its own for each call: a scheduler counts its steps, and calls may run beside each other. It adds the
        # last time, 0, itself.
        scheduler: Any = type(given).from_config(given.config)
        scheduler.set_timesteps(sigmas=ts[:-1].tolist(), device=x.device)
        for i, t in enumerate(progress(scheduler.timesteps)):
            v = velocity(x, (t / scheduler.config.num_train_timesteps).expand(len(x)))
            x = scheduler.step(v, t, x, return_dict=False)[0]
            now, then = scheduler.sigmas[i : i + 2].tolist()
            x = on_step(Step(i, now, then, x, v))
        return x

    return solve


def _shifted(solver: Solver, shift: float) -> Solver:
    """`solver` on times that it shifts itself, as a scheduler of diffusers does."""

    def solve(velocity: VelocityField, x: Tensor, ts: Tensor, on_step: OnStep = keep) -> Tensor:
        return solver(velocity, x, shift_time(ts, shift), on_step)

    return solve


def write_entry(directory: Path) -> None:
    """Write the file in which diffusers finds this class, and name it in model_index.json.

    So `DiffusionPipeline.from_pretrained` says that it needs trust_remote_code, instead of missing a class of its own.
    """
    index = directory / DiffusionPipeline.config_name
    config = json.loads(index.read_text(encoding="utf-8"))
    config["_class_name"] = ["pipeline", WeMMUPipeline.__name__]
    index.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (directory / "pipeline.py").write_text(PIPELINE_FILE, encoding="utf-8")


def _check_layers(vlm: PreTrainedModel | None, bridge: WeMMUBridge) -> None:
    """Refuse a VLM with another shape than the one that the bridge's layers were copied from."""
    if vlm is None:
        raise ValueError(
            "this export does not contain the VLM; load the one that it was trained with (its README.md says which) "
            "and give it as vlm=AutoModelForImageTextToText.from_pretrained(...)"
        )
    own, copied = vlm.config.text_config, bridge.config["text_config"]
    shape = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    pairs = {name: (getattr(own, name), copied[name]) for name in shape}
    for name, (has, needs) in (pairs | {"rope_theta": (rope_theta(own), rope_theta(copied))}).items():
        if has != needs:
            raise ValueError(f"the bridge was trained with a VLM with {name} {needs}, the one given has {has}")
