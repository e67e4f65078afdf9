"""A stage of UAE that trained the generator -> the WeMMU model that it is, for the export of a pipeline."""

from dataclasses import replace
from pathlib import Path

import torch

from tools.export.stored import DIFFUSERS_FILE, published, trained, with_adapters
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

    The bridge is the one that the generator began with, the DiT the checkpoint's, with its adapters merged. Where the
    policy conditions the generator, its VLM is the pipeline's. ema: whether the DiT's moving averages are meant.

    Raises:
        CheckpointError: if weights are damaged or of another model.
    """
    recipe = run.recipe
    assert isinstance(recipe, UAE)
    base, tuned = StoredTensors(recipe.generator.weights), StoredTensors(checkpoint, ema)
    assert run.backbones.dit is not None, "the recipe uae has one"
    original = published(run.backbones.dit, DIFFUSERS_FILE)
    dit = with_adapters(with_adapters(original, base, "dit."), tuned, DIT)
    stored = {name: each for name, each in trained(base, "").items() if not name.startswith("dit.")}
    stored |= {f"dit.{name}": each for name, each in dit.items() if each is not original.get(name)}
    shapes = {name: list(each.shape) for name, each in stored.items()}
    frozen = dict(base.manifest.frozen)
    if stored.keys() >= {f"dit.{name}" for name in dit}:
        frozen.pop("dit", None)
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
        out / SHIPPED,
        {name: (torch.float32, shape) for name, shape in shapes.items()},
        lambda name: stored[name].read(),
    )
    adapters = {prefix: scale for prefix, scale in base.manifest.adapters.items() if prefix != "dit."}
    manifest = replace(
        tuned.manifest, tensors=shapes, trained=[], ema=False, frozen=frozen, adapters=adapters,
        copied=base.manifest.copied, files={SHIPPED: sha256_of(out / SHIPPED)},
    )  # fmt: skip
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
