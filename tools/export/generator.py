"""A stage of UAE that trained the generator -> the WeMMU model that it is, for the export of a pipeline."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tools.export.vlm import write_vlm
from wemmu.checkpoint.manifest import sha256_of, write_manifest
from wemmu.checkpoint.store import SHIPPED
from wemmu.checkpoint.stored import StoredTensors
from wemmu.checkpoint.stream import write_safetensors
from wemmu.config import StageRun
from wemmu.config.objectives import TimeSampling
from wemmu.published.identity import identity
from wemmu.recipes.uae.config import UAE
from wemmu.recipes.wemmu.config import FlowMatching, WeMMU

DIT = "generator.dit."


def as_wemmu(run: StageRun, checkpoint: Path, work: Path, ema: bool) -> tuple[StageRun, Path]:
    """Return the generator as a stage of WeMMU, and its weights in the empty folder `work`, float32.

    The bridge is the one that the generator began with, the DiT the checkpoint's. Where the policy conditions the
    generator, its VLM is the pipeline's. ema: whether the DiT's moving averages are meant.

    Raises:
        CheckpointError: if weights are damaged or of another model.
    """
    recipe = run.recipe
    assert isinstance(recipe, UAE)
    base, tuned = StoredTensors(recipe.generator.weights), StoredTensors(checkpoint, ema)
    read: dict[str, Callable[[], Tensor]] = {name: partial(base.read, name) for name in base.manifest.tensors}
    shapes = dict(base.manifest.tensors)
    for name, shape in tuned.manifest.tensors.items():
        if name.startswith(DIT):
            own = "dit." + name.removeprefix(DIT)
            read[own], shapes[own] = partial(tuned.read, name), shape
    frozen = {name: sha256 for name, sha256 in base.manifest.frozen.items() if name != "dit"}
    backbones = run.backbones
    if recipe.cond_encoder == "policy" and any(name.startswith("vlm.") for name in tuned.manifest.tensors):
        vlm = work / "vlm"
        vlm.mkdir()
        write_vlm(run, checkpoint, vlm, "float32", forward=False, ema=ema, folder=None)
        backbones = backbones.model_copy(update={"vlm": vlm})
        frozen["vlm"] = identity(vlm)
    out = work / "weights"
    out.mkdir()
    write_safetensors(
        out / SHIPPED, {name: (torch.float32, shape) for name, shape in shapes.items()}, lambda name: read[name]()
    )
    manifest = replace(
        tuned.manifest, tensors=shapes, trained=[], ema=False, frozen=frozen, files={SHIPPED: sha256_of(out / SHIPPED)}
    )
    write_manifest(out, manifest)
    time = TimeSampling(shift=recipe.generator.shift, reference_resolution=run.stage.resolution)
    guidance = {"steps": recipe.generator.steps, "solver": "euler", "t2i": recipe.generator.guidance}
    return run.model_copy(
        update={
            "recipe": WeMMU(bridge=recipe.generator.bridge),
            "backbones": backbones,
            "stage": run.stage.model_copy(update={"objective": FlowMatching(time=time)}),
            "sampling": run.sampling.model_copy(update=guidance),
        }
    ), out
