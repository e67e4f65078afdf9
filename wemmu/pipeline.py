"""WeMMU as a diffusers pipeline: what training left, for anybody to load and ask for pictures.

    pipe = WeMMUPipeline.from_pretrained(directory)
    pipe("a red circle above a blue square").images[0]
    pipe("make the circle green", image=picture).images[0]

The pipeline stands above the rooms it connects: the model conditions, the sampler solves, and what is here only
translates a call into requests to them.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import (
    AutoencoderDC,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    SanaTransformer2DModel,
)
from PIL import Image
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from wemmu.config.schema import Sampling
from wemmu.models.component import WeMMUBridge
from wemmu.models.model import WeMMU
from wemmu.models.precision import keep_float32_buffers
from wemmu.models.vae import FrozenVAE
from wemmu.models.vlm import FrozenVLM
from wemmu.pixels import to_images
from wemmu.prompts import PromptEncoder
from wemmu.sampling.sampler import Request, Sampler, task_of
from wemmu.timesteps import VelocityField

OUTPUT_TYPES = ("pil", "pt", "np")
Pictures = Image.Image | Sequence[Image.Image] | None


class WeMMUPipeline(DiffusionPipeline):
    """Text, pictures or both -> pictures.

    resolution: side in px of the pictures it was trained to make last. The other numbers are the defaults of a call;
    `Sampling` in `wemmu.config.schema` says what they mean.
    """

    # An export may leave out the VLM, which training never changes; it must then be given when loading.
    _optional_components: ClassVar[list[str]] = ["vlm"]

    def __init__(
        self,
        vlm: Qwen2_5_VLForConditionalGeneration | None,
        processor: Qwen2_5_VLProcessor,
        transformer: SanaTransformer2DModel,
        vae: AutoencoderDC,
        scheduler: FlowMatchEulerDiscreteScheduler,
        bridge: WeMMUBridge,
        resolution: int = 1024,
        num_inference_steps: int = 20,
        t2i_guidance_scale: float = 4.0,
        image_guidance_scale: float = 2.0,
        instruction_guidance_scale: float = 3.0,
        multi_guidance_scale: float = 3.0,
    ):
        super().__init__()
        _check_layers(vlm, bridge)
        for part in (vlm, transformer):
            keep_float32_buffers(part)
        self.register_modules(
            vlm=vlm, processor=processor, transformer=transformer, vae=vae, scheduler=scheduler, bridge=bridge
        )
        self.register_to_config(
            resolution=resolution,
            num_inference_steps=num_inference_steps,
            t2i_guidance_scale=t2i_guidance_scale,
            image_guidance_scale=image_guidance_scale,
            instruction_guidance_scale=instruction_guidance_scale,
            multi_guidance_scale=multi_guidance_scale,
        )

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        image: Pictures | Sequence[Pictures] = None,
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
    ) -> ImagePipelineOutput:
        """Make one picture for each prompt.

        A request without pictures is text to image, with one picture an edit (without words: a reconstruction), with
        several an edit that combines them; requests of different kinds may stand in one call.

        Args:
            prompt: one text, or a list with one for each picture to make.
            image: for one text, its input picture or the list of its input pictures; for a list of texts, a list with
                such an entry, or None, for each. They are resized to `height` x `width`.
            height, width: px, multiples of the autoencoder's factor; the resolution trained at unless given. The side
                of the bridge's position table bounds them.
            num_inference_steps: steps of the scheduler.
            t2i_guidance_scale: weight of the words, in text to image.
            image_guidance_scale: weight of the picture, in an edit or a reconstruction.
            instruction_guidance_scale: weight of the instruction, in an edit.
            multi_guidance_scale: weight of everything given, in an edit of several pictures.
            seed: picture i is a function of its request and of `seed` + i alone, or of `seed[i]` if it is a list.
            generator: draws the seeds instead; one, or one for each prompt. Without either, torch's global one does.
            output_type: "pil"; "pt", [B, 3, H, W] in [0, 1]; or "np", [B, H, W, 3] in [0, 1].

        Raises:
            ValueError: if the arguments do not fit each other or the model, naming what would.
        """
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type is {output_type!r}; valid choices: {', '.join(OUTPUT_TYPES)}")
        texts, pictures = _requests(prompt, image)
        size = (height or self.config.resolution, width or self.config.resolution)
        seeds = _seeds(seed, generator, len(texts))
        sampling = self._sampling(
            steps=num_inference_steps,
            t2i=t2i_guidance_scale,
            image=image_guidance_scale,
            instruction=instruction_guidance_scale,
            multi=multi_guidance_scale,
        )
        sampler = self._sampler()
        groups: dict[tuple[str, int], list[int]] = {}
        for i, (text, given) in enumerate(zip(texts, pictures, strict=True)):
            groups.setdefault((task_of(text, len(given)), len(given)), []).append(i)
        made: dict[int, Tensor] = {}
        for (task, _), members in groups.items():
            images = torch.stack([_pixels(pictures[i], size) for i in members]).to(self._execution_device)
            request = Request(task, [texts[i] for i in members], images, size, seeds[members])
            with torch.autocast(images.device.type, self.transformer.dtype, self.transformer.dtype != torch.float32):
                made |= zip(members, sampler(request, sampling), strict=True)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=_output(torch.stack([made[i] for i in range(len(texts))]), output_type))

    def _sampling(self, **given: Any) -> Sampling:
        defaults = {
            "steps": self.config.num_inference_steps,
            "t2i": self.config.t2i_guidance_scale,
            "image": self.config.image_guidance_scale,
            "instruction": self.config.instruction_guidance_scale,
            "multi": self.config.multi_guidance_scale,
        }
        return Sampling(**defaults | {name: value for name, value in given.items() if value is not None})

    def _sampler(self) -> Sampler:
        """A sampler over the components as they are now; they may have been exchanged or moved since the last call."""
        pixels = self.processor.image_processor
        vlm = FrozenVLM(self.vlm, pixels.image_mean, pixels.image_std).to(self._execution_device)
        model = WeMMU(vlm, FrozenVAE(self.vae), self.bridge, self.transformer)
        # Evenly spaced times, for the scheduler shifts them itself.
        return Sampler(model, PromptEncoder(self.processor), shift=1.0, solver=self._solve)

    def _solve(self, velocity: VelocityField, x: Tensor, ts: Tensor) -> Tensor:
        """The scheduler as a `Solver`: x [B, ...] at ts[0] -> x at ts[-1] = 0, which schedulers add themselves."""
        self.scheduler.set_timesteps(sigmas=ts[:-1].tolist(), device=x.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            v = velocity(x, (t / self.scheduler.config.num_train_timesteps).expand(len(x)))
            x = self.scheduler.step(v, t, x, return_dict=False)[0]
        return x


def _check_layers(vlm: Qwen2_5_VLForConditionalGeneration | None, bridge: WeMMUBridge) -> None:
    """Refuse a VLM other than the one the bridge's layers were copied from, as far as its shape tells."""
    if vlm is None:
        raise ValueError(
            "this export does not hold the VLM; load the one it was trained beside (its README.md says which) and give "
            "it as vlm=Qwen2_5_VLForConditionalGeneration.from_pretrained(...)"
        )
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "rope_theta"):
        has, needs = getattr(vlm.config.text_config, name), bridge.config.text_config[name]
        if has != needs:
            raise ValueError(f"the bridge was trained beside a VLM with {name} {needs}, the one given has {has}")


def _requests(
    prompt: str | Sequence[str], image: Pictures | Sequence[Pictures]
) -> tuple[list[str], list[list[Image.Image]]]:
    """Texts and, for each, its list of pictures."""
    texts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not texts:
        raise ValueError("prompt is an empty list; give one text for each picture to make")
    if isinstance(prompt, str) or image is None:
        entries: list[Any] = [image] * len(texts)
    elif isinstance(image, Image.Image) or len(image) != len(texts):
        number = 1 if isinstance(image, Image.Image) else len(image)
        raise ValueError(
            f"a list of {len(texts)} prompts needs a list of {len(texts)} entries as image, each a picture, a list of "
            f"pictures or None; got {number}"
        )
    else:
        entries = list(image)
    pictures = [[] if e is None else [e] if isinstance(e, Image.Image) else list(e) for e in entries]
    for given in pictures:
        if wrong := [type(p).__name__ for p in given if not isinstance(p, Image.Image)]:
            raise ValueError(f"image must hold PIL pictures, got {wrong[0]}")
    return texts, pictures


def _seeds(
    seed: int | Sequence[int] | None, generator: torch.Generator | Sequence[torch.Generator] | None, number: int
) -> Tensor:
    """The seed of each picture, int64 [number]."""
    if seed is not None and generator is not None:
        raise ValueError("give either seed or generator, not both")
    if isinstance(seed, int):
        return torch.arange(seed, seed + number)
    several = seed if seed is not None else generator
    if isinstance(several, Sequence) and len(several) != number:
        raise ValueError(f"{number} prompts need {number} seeds or generators, got {len(several)}")
    if seed is not None:
        return torch.tensor(seed)
    sources = generator if isinstance(generator, Sequence) else [generator] * number
    drawn = [torch.randint(2**62, (1,), generator=g, device=g.device if g else "cpu") for g in sources]
    return torch.cat([d.cpu() for d in drawn])


def _pixels(pictures: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
    """Input pictures of one request, resized to (height, width): uint8 [N, 3, H, W]."""
    height, width = size
    resized = [p.convert("RGB").resize((width, height), Image.Resampling.BICUBIC) for p in pictures]
    stacked = np.stack(resized) if resized else np.zeros((0, height, width, 3), np.uint8)
    return torch.from_numpy(stacked).permute(0, 3, 1, 2)


def _output(pixels: Tensor, output_type: str) -> list[Image.Image] | Tensor | np.ndarray:
    """Pixels [B, 3, H, W] in [-1, 1] in the form that was asked for."""
    if output_type == "pil":
        return to_images(pixels)
    unit = (pixels.float() / 2 + 0.5).clamp(0, 1)
    return unit if output_type == "pt" else unit.permute(0, 2, 3, 1).cpu().numpy()
