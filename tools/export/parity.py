"""Compares images of the exported pipeline with images of the trained model; loads one after the other."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tools.export.report import ParityError
from wemmu.backbones.weights import load_vlm
from wemmu.config import StageRun
from wemmu.config.schema import Sampling
from wemmu.pipeline import WeMMUPipeline
from wemmu.prompts import PromptEncoder
from wemmu.recipes.lora import merge
from wemmu.recipes.wemmu.config import FlowMatching
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.sampling.request import GenerationRequest, task_of
from wemmu.sampling.sampler import Sampler
from wemmu.training.build import load_trained

# Largest difference of any channel of any pixel, in [0, 1]. Both sides compute in float32 with equal weights and the
# same kernels, so only the scheduler's times, float32 where ours are doubles, may tell them apart.
BOUND = 1e-5
STEPS = 2
SEED = 1
# (text, number of input images): one request of each guidance rule.
REQUESTS = (
    ("a red circle above a blue square", 0),
    ("make the circle green", 1),
    ("replace the circle with the object of the second image", 2),
)


def compare_outputs(
    run: StageRun, checkpoint: Path, directory: Path, dtype: torch.dtype, without_vlm: bool, ema: bool
) -> dict[str, Any]:
    """Load the training model and the pipeline in `directory`, whose type is `dtype`; draw with each and compare.

    ema: whether the weights are the moving averages in the checkpoint.
    Returns what the report of parity says of it. Two models are never in memory at a time.

    Raises:
        ParityError: if a pixel differs.
    """
    # Whatever the stage computed in, its weights are float32, and so is the comparison. Features of the frozen models
    # are not remembered, since these are rounded below.
    run = run.changed({"backbones.dtype": "float32", "memory.cached_images": 0})
    made = load_trained(run, checkpoint, ema)
    model = made.model
    assert isinstance(model, WeMMU)
    trained = draw_trained(model, made.encoder, run)
    same = dtype == torch.float32 and not model.adapters
    merge(model)
    _round(model, dtype)
    rounded = trained if same else draw_trained(model, made.encoder, run)
    del made, model
    given = {}
    if without_vlm:
        given["vlm"] = load_vlm(run.backbones.vlm, torch.float32)[0]
        _round(given["vlm"], dtype)
    exported = draw_exported(WeMMUPipeline.from_pretrained(directory, **given))
    return compare_images(exported, rounded, trained)


def draw_trained(model: WeMMU, encoder: PromptEncoder, run: StageRun) -> Tensor:
    """Generate the fixed requests with the training model: [R, 3, H, W] in [0, 1]."""
    resolution, objective = run.stage.resolution, run.stage.objective
    assert isinstance(objective, FlowMatching)
    sampler = Sampler(model, encoder, objective.time.shift_at(resolution))
    sampling = run.sampling.model_copy(update={"steps": STEPS, "seed": 0})
    drawn = [_draw(sampler, sampling, text, number, resolution) for text, number in REQUESTS]
    return (torch.cat(drawn) / 2 + 0.5).clamp(0, 1)


def draw_exported(pipe: WeMMUPipeline) -> Tensor:
    """Generate the fixed requests with the pipeline: [R, 3, H, W] in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    texts = [text for text, _ in REQUESTS]
    given = [[Image.fromarray(p) for p in _inputs(number, pipe.config["resolution"])] for _, number in REQUESTS]
    return pipe(texts, image=given, num_inference_steps=STEPS, seed=[SEED] * len(texts), output_type="pt").images


def compare_images(exported: Tensor, rounded: Tensor, trained: Tensor) -> dict[str, Any]:
    """Compare with the training model whose weights were rounded to the type of the export, and tell what rounding did.

    Raises:
        ParityError: if any pixel differs by more than `BOUND`.
    """
    difference = float((exported - rounded).abs().max())
    # Written so that a NaN on either side fails.
    if not difference <= BOUND:
        raise ParityError(f"the images differ by {difference:.1e}, more than {BOUND:.0e}")
    moved = float((rounded - trained).abs().max())
    what = f"images of {len(REQUESTS)} requests, {STEPS} steps"
    return {
        "compared": True,
        "requests": [{"prompt": text, "images": number} for text, number in REQUESTS],
        "steps": STEPS,
        "max_abs_difference": difference,
        "bound": BOUND,
        "changed_by_type": moved,
        "lines": [
            f"{what}: max abs difference {difference:.1e} (bound {BOUND:.0e})",
            f"the type of the export changed them by {moved:.1e}",
        ],
    }


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Give every parameter the values it will have after being stored in `dtype`."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _draw(sampler: Sampler, sampling: Sampling, text: str, number: int, resolution: int) -> Tensor:
    images = torch.from_numpy(_inputs(number, resolution)).permute(0, 3, 1, 2)[None]
    request = GenerationRequest(task_of(text, number), [text], images, (resolution, resolution), torch.tensor([SEED]))
    return sampler(request, sampling)


def _inputs(number: int, resolution: int) -> np.ndarray[Any, Any]:
    """`number` images of noise: uint8 [number, H, W, 3]."""
    return np.random.default_rng(SEED).integers(0, 256, (number, resolution, resolution, 3), np.uint8)
