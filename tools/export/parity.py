"""Does the exported pipeline draw what the model that was trained draws? Both are loaded, one after the other."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from tools.export.report import ParityError
from wemmu.backbones.weights import hash_tensors, load_strict, load_vlm
from wemmu.config import StageRun
from wemmu.config.schema import Sampling
from wemmu.pipeline import WeMMUPipeline
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.component import WeMMUBridge
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.sampling.request import GenerationRequest, task_of
from wemmu.sampling.sampler import Sampler
from wemmu.training.build import load_trained

# Largest difference of any channel of any pixel, in [0, 1]. Both sides compute in float32 with equal weights and the
# same kernels, so only the scheduler's times, float32 where ours are doubles, may tell them apart.
BOUND = 1e-5
STEPS = 2
SEED = 1
# (text, number of input pictures): one request of each guidance rule.
REQUESTS = (("a red circle above a blue square", 0), ("make the circle green", 1), ("put both into one picture", 2))


@dataclass(frozen=True)
class Inventory:
    """What a component holds: name -> shape of every tensor, and one hash over names, shapes and float32 values."""

    shapes: dict[str, tuple[int, ...]]
    sha256: str

    @classmethod
    def of(cls, component: nn.Module) -> "Inventory":
        tensors = component.state_dict()
        return cls({name: tuple(t.shape) for name, t in tensors.items()}, hash_tensors(tensors.items()))


def compare_outputs(
    run: StageRun, checkpoint: Path, directory: Path, dtype: torch.dtype, without_vlm: bool, ema: bool
) -> dict[str, Any]:
    """Load the training model and the pipeline in `directory`, whose type is `dtype`; draw with each and compare.

    ema: whether the weights are the moving averages in the checkpoint.
    Returns what the report of parity says of it. Two models are never in memory at a time.

    Raises:
        ParityError: if a tensor or a pixel differs.
    """
    # Whatever the stage computed in, its weights are float32, and so is the comparison.
    run = run.model_copy(update={"backbones": run.backbones.model_copy(update={"dtype": "float32"})})
    made = load_trained(run, checkpoint, ema)
    trained = draw_trained(made.model, made.encoder, run)
    _round(made.model, dtype)
    rounded = draw_trained(made.model, made.encoder, run) if dtype != torch.float32 else trained
    parts = components(made.model)
    inventories = {name: Inventory.of(component) for name, component in parts.items()}
    classes = {name: type(component) for name, component in parts.items()} | {"bridge": WeMMUBridge}
    del made, parts
    given = {}
    if without_vlm:
        del inventories["vlm"]
        given["vlm"] = load_vlm(run.backbones.vlm, torch.float32)[0]
        _round(given["vlm"], dtype)
    lines = compare_tensors(directory, inventories, classes)
    exported = draw_exported(WeMMUPipeline.from_pretrained(directory, **given))
    return compare_pictures(exported, rounded, trained, lines)


def components(model: WeMMU) -> dict[str, nn.Module]:
    """The trained model under the names of the pipeline."""
    return {"vlm": model.vlm.vlm, "transformer": model.dit, "vae": model.vae.vae, "bridge": model.bridge}


def compare_tensors(directory: Path, trained: dict[str, Inventory], classes: dict[str, type]) -> list[str]:
    """Load each component from disk, strictly, and compare; returns a line for each.

    Raises:
        ParityError: naming the component and the first tensor that differs.
        ValueError: from the strict loading.
    """
    lines = [f"{'component':12}{'tensors':>9}{'parameters':>16}{'missing':>9}{'unexpected':>12}  sha256 of the values"]
    for name, expected in trained.items():
        component, report = load_strict(classes[name], directory / name, torch.float32)
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


def compare_pictures(exported: Tensor, rounded: Tensor, trained: Tensor, lines: list[str]) -> dict[str, Any]:
    """Compare with the training model whose weights were rounded to the type of the export, and tell what rounding did.

    lines: what was found before, which the report repeats.

    Raises:
        ParityError: if any pixel differs by more than `BOUND`.
    """
    difference = float((exported - rounded).abs().max())
    # Written so that a NaN on either side fails.
    if not difference <= BOUND:
        raise ParityError(f"the pictures differ by {difference:.1e}, more than {BOUND:.0e}")
    moved = float((rounded - trained).abs().max())
    what = f"pictures of {len(REQUESTS)} requests, {STEPS} steps"
    return {
        "compared": True,
        "requests": [{"prompt": text, "pictures": number} for text, number in REQUESTS],
        "steps": STEPS,
        "max_abs_difference": difference,
        "bound": BOUND,
        "changed_by_type": moved,
        "lines": [
            *lines,
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


def _inputs(number: int, resolution: int) -> np.ndarray:
    """`number` pictures of noise: uint8 [number, H, W, 3]."""
    return np.random.default_rng(SEED).integers(0, 256, (number, resolution, resolution, 3), np.uint8)
