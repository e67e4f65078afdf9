"""WeMMU in ComfyUI: copy this folder to ComfyUI/custom_nodes/wemmu; docs/ui.md says what else it needs.

Images are ComfyUI's: float tensors [B, H, W, 3] in [0, 1].
"""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from wemmu.pipeline import WeMMUPipeline
from wemmu.source import choose_device, open_pipeline

PIPELINE = "WEMMU_PIPELINE"
# The largest seed of the pipeline; image i uses seed + i.
_MAX_SEED = 2**62
# Inputs of every node that samples; 0 means the value of the export.
_SAMPLING = {
    "seed": ("INT", {"default": 0, "min": 0, "max": _MAX_SEED, "control_after_generate": True}),
    "steps": ("INT", {"default": 0, "min": 0, "max": 1000, "tooltip": "0: the value of the export"}),
    "solver": (["euler", "heun"],),
    "guidance": (
        "FLOAT",
        {
            "default": 0.0,
            "min": 0.0,
            "max": 30.0,
            "step": 0.1,
            "tooltip": "Guidance scale of the text; 0: the value of the export",
        },
    ),
    "height": (
        "INT",
        {"default": 0, "min": 0, "max": 8192, "step": 16, "tooltip": "0 and 0: the shape of the first image"},
    ),
    "width": (
        "INT",
        {"default": 0, "min": 0, "max": 8192, "step": 16, "tooltip": "0 and 0: the shape of the first image"},
    ),
}
_PROMPT = ("STRING", {"multiline": True, "default": ""})


class WeMMULoad:
    """A directory that `wemmu export` wrote -> a pipeline."""

    CATEGORY, FUNCTION = "WeMMU", "load"
    RETURN_TYPES, RETURN_NAMES = (PIPELINE,), ("pipeline",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "directory": ("STRING", {"default": "runs/demo/export"}),
                "device": (
                    ["auto", "cpu", "cuda", "offload"],
                    {"tooltip": "offload: one component on the GPU at a time"},
                ),
                "dtype": (["as stored", "float32", "bfloat16"],),
            }
        }

    def load(self, directory: str, device: str, dtype: str) -> tuple[WeMMUPipeline]:
        given = {} if dtype == "as stored" else {"torch_dtype": getattr(torch, dtype)}
        pipe = open_pipeline(Path(directory).expanduser(), **given)
        pipe.set_progress_bar_config(disable=True)
        if device == "offload":
            pipe.enable_model_cpu_offload()
            return (pipe,)
        return (pipe.to(choose_device(None if device == "auto" else device)),)


class WeMMUGenerate:
    """A prompt -> images."""

    CATEGORY, FUNCTION = "WeMMU", "generate"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "pipeline": (PIPELINE,),
                "prompt": _PROMPT,
                "negative_prompt": _PROMPT,
                "count": ("INT", {"default": 1, "min": 1, "max": 64}),
                **_SAMPLING,
            }
        }

    def generate(
        self, pipeline: WeMMUPipeline, prompt: str, negative_prompt: str, count: int, **sampling: Any
    ) -> tuple[Tensor]:
        texts = {"prompt": prompt, "negative_prompt": negative_prompt or None, "num_images_per_prompt": count}
        return (_images(pipeline, sampling, **texts),)


class WeMMUEdit:
    """Images and an instruction -> edited images; without a prompt, the image again.

    `image` may be a batch, whose images are edited one by one. `image_2` to `image_4` are combined with each of them.
    """

    CATEGORY, FUNCTION = "WeMMU", "edit"
    RETURN_TYPES = ("IMAGE",)
    MORE: ClassVar[tuple[str, ...]] = ("image_2", "image_3", "image_4")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {"pipeline": (PIPELINE,), "image": ("IMAGE",), "prompt": _PROMPT, **_SAMPLING},
            "optional": {name: ("IMAGE",) for name in cls.MORE},
        }

    def edit(self, pipeline: WeMMUPipeline, image: Tensor, prompt: str, **given: Any) -> tuple[Tensor]:
        more = [one for name in self.MORE if name in given for one in given.pop(name)[:1]]
        inputs = [[one.movedim(-1, 0).clamp(0, 1) for one in (first, *more)] for first in image]
        return (_images(pipeline, given, prompt=[prompt] * len(inputs), image=inputs),)


def _images(pipeline: WeMMUPipeline, sampling: dict[str, Any], **request: Any) -> Tensor:
    """Images [B, H, W, 3] of a request with the fields of `_SAMPLING`."""
    steps = sampling["steps"] or pipeline.config.num_inference_steps
    images = pipeline(
        **request,
        seed=sampling["seed"],
        num_inference_steps=steps,
        solver=sampling["solver"],
        guidance_scale=sampling["guidance"] or None,
        height=sampling["height"] or None,
        width=sampling["width"] or None,
        callback_on_step_end=_progress(steps),
        output_type="pt",
    ).images
    return images.movedim(1, -1).float().cpu()


def _progress(steps: int) -> Any:
    """Moves ComfyUI's progress bar, where this runs in ComfyUI."""
    try:
        from comfy.utils import ProgressBar
    except ImportError:
        return None
    bar = ProgressBar(steps)

    def on_step(_: Any, index: int, __: Any, ___: Any) -> dict[str, Any]:
        bar.update_absolute(index + 1)
        return {}

    return on_step


NODE_CLASS_MAPPINGS = {"WeMMULoad": WeMMULoad, "WeMMUGenerate": WeMMUGenerate, "WeMMUEdit": WeMMUEdit}
NODE_DISPLAY_NAME_MAPPINGS = {
    "WeMMULoad": "WeMMU load",
    "WeMMUGenerate": "WeMMU generate",
    "WeMMUEdit": "WeMMU edit or reconstruct",
}
