"""Is the exported pipeline the model that was trained? Tensor by tensor, then picture by picture."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen2_5_VLForConditionalGeneration

from wemmu.config import StageRun
from wemmu.config.schema import Sampling
from wemmu.models.component import WeMMUBridge
from wemmu.models.model import WeMMU
from wemmu.models.weights import hash_tensors, load_strict
from wemmu.pipeline import WeMMUPipeline
from wemmu.prompts import PromptEncoder
from wemmu.sampling.sampler import Request, Sampler, task_of

# Largest difference of any channel of any pixel, in [0, 1]. Both sides compute in float32 with equal weights and the
# same kernels, so only the scheduler's times, float32 where ours are doubles, may tell them apart.
BOUND = 1e-5
STEPS = 2
SEED = 1
# (text, number of input pictures): one request of each guidance rule.
REQUESTS = (("a red circle above a blue square", 0), ("make the circle green", 1), ("put both into one picture", 2))
CLASSES = {
    "vlm": Qwen2_5_VLForConditionalGeneration,
    "transformer": SanaTransformer2DModel,
    "vae": AutoencoderDC,
    "bridge": WeMMUBridge,
}


class ParityError(RuntimeError):
    """The export is not the model that was trained."""


@dataclass(frozen=True)
class Inventory:
    """What a component holds: name -> shape of every tensor, and one hash over names, shapes and float32 values."""

    shapes: dict[str, tuple[int, ...]]
    sha256: str

    @classmethod
    def of(cls, component: nn.Module) -> "Inventory":
        tensors = component.state_dict()
        return cls({name: tuple(t.shape) for name, t in tensors.items()}, hash_tensors(tensors.items()))


def components(model: WeMMU) -> dict[str, nn.Module]:
    """The trained model under the names of the pipeline."""
    return {"vlm": model.vlm.vlm, "transformer": model.dit, "vae": model.vae.vae, "bridge": model.bridge}


def compare_tensors(directory: Path, trained: dict[str, Inventory]) -> list[str]:
    """Load each component from disk, strictly, and compare; returns a line for each.

    Raises:
        ParityError: naming the component and the first tensor that differs.
        ValueError: from the strict loading.
    """
    lines = [f"{'component':12}{'tensors':>9}{'parameters':>16}{'missing':>9}{'unexpected':>12}  sha256 of the values"]
    for name, expected in trained.items():
        component, report = load_strict(CLASSES[name], directory / name, torch.float32)
        found = Inventory.of(component)
        if found.shapes != expected.shapes:
            odd = sorted(found.shapes.items() ^ expected.shapes.items())
            raise ParityError(f"{name} differs from the training model in names or shapes, first in {odd[0][0]}")
        if found.sha256 != expected.sha256:
            raise ParityError(f"{name} has other values than the training model's (SHA-256 {found.sha256[:12]})")
        lines.append(
            f"{name:12}{len(found.shapes):9}{report.parameters:16,}{len(report.missing):9}{len(report.unexpected):12}"
            f"  {found.sha256}"
        )
    return lines


def draw_trained(model: WeMMU, encoder: PromptEncoder, run: StageRun) -> Tensor:
    """The fixed requests, drawn as training draws its samples: [R, 3, H, W] in [0, 1]."""
    resolution, time = run.stage.resolution, run.stage.objective.time
    sampler = Sampler(model, encoder, time.shift_at(resolution))
    sampling = run.sampling.model_copy(update={"steps": STEPS, "seed": 0})
    drawn = [_draw(sampler, sampling, text, number, resolution) for text, number in REQUESTS]
    return (torch.cat(drawn) / 2 + 0.5).clamp(0, 1)


def draw_exported(pipe: WeMMUPipeline) -> Tensor:
    """The fixed requests, as a user of the export asks for them."""
    pipe.set_progress_bar_config(disable=True)
    texts = [text for text, _ in REQUESTS]
    given = [[Image.fromarray(p) for p in _inputs(number, pipe.config.resolution)] for _, number in REQUESTS]
    return pipe(texts, image=given, num_inference_steps=STEPS, seed=[SEED] * len(texts), output_type="pt").images


def compare_pictures(exported: Tensor, rounded: Tensor, trained: Tensor) -> list[str]:
    """Compare with the training model whose weights were rounded to the type of the export, and tell what rounding did.

    Raises:
        ParityError: if any pixel differs by more than `BOUND`.
    """
    difference = float((exported - rounded).abs().max())
    # Written so that a NaN on either side fails.
    if not difference <= BOUND:
        raise ParityError(f"the pictures differ by {difference:.1e}, more than {BOUND:.0e}")
    return [
        f"pictures of {len(REQUESTS)} requests, {STEPS} steps: max abs difference {difference:.1e} (bound {BOUND:.0e})",
        f"the type of the export changed them by {float((rounded - trained).abs().max()):.1e}",
    ]


def _draw(sampler: Sampler, sampling: Sampling, text: str, number: int, resolution: int) -> Tensor:
    images = torch.from_numpy(_inputs(number, resolution)).permute(0, 3, 1, 2)[None]
    request = Request(task_of(text, number), [text], images, (resolution, resolution), torch.tensor([SEED]))
    return sampler(request, sampling)


def _inputs(number: int, resolution: int) -> np.ndarray:
    """`number` pictures of noise: uint8 [number, H, W, 3]."""
    return np.random.default_rng(SEED).integers(0, 256, (number, resolution, resolution, 3), np.uint8)
