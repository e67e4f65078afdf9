"""The model of a stage without memory: names, shapes and configs, from the backbones' directories alone."""

from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers.models import ModelMixin

from wemmu.backbones.adapters import class_of
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.weights import vlm_without_weights
from wemmu.config import StageRun
from wemmu.published.check import check_backbones
from wemmu.published.identity import identity
from wemmu.published.known import AUTOENCODER, TRANSFORMER
from wemmu.recipes.staged import startable
from wemmu.recipes.wemmu.build import assemble
from wemmu.recipes.wemmu.model import WeMMU


def skeleton(run: StageRun) -> WeMMU:
    """Return the model that `wemmu.recipes.wemmu.build.build_model` builds, every weight on the meta device.

    Raises:
        BackboneError: if a backbone's directory is not in the published layout, or the VLM's weights are not those of
            its config.
    """
    check_backbones(run.backbones, run.recipe.backbones)
    vlm = vlm_without_weights(run.backbones.vlm)
    assert run.backbones.vae is not None, "the recipe wemmu has one"
    assert run.backbones.dit is not None, "the recipe wemmu has one"
    vae, dit = FrozenVAE(_of_config(run.backbones.vae, AUTOENCODER)), _of_config(run.backbones.dit, TRANSFORMER)
    with init_empty_weights():
        return assemble(run, vlm, vae, dit)[0]


def identities(run: StageRun) -> dict[str, str]:
    """Return the identity of each backbone's weights, as checkpoints record it."""
    given = run.backbones.directories(run.recipe.backbones)
    return {name: identity(directory) for name, directory in given.items()}


def shapes(model: WeMMU) -> dict[str, list[int]]:
    """Return canonical name -> shape of every tensor that a stage can train or a checkpoint can contain."""
    return {name: list(tensor.shape) for name, tensor in startable(model).items()}


def _of_config(directory: Path, kind: str) -> ModelMixin:
    cls: Any = class_of(directory, kind)
    with init_empty_weights():
        return cls.from_config(cls.load_config(directory))
