"""The model of a stage without memory: names, shapes and configs, from the backbones' directories alone."""

from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from torch import nn

from wemmu.backbones.adapters import class_of
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.weights import vlm_without_weights
from wemmu.config import StageRun
from wemmu.published.check import check_backbones
from wemmu.published.identity import identity
from wemmu.published.known import AUTOENCODER, VLM
from wemmu.recipes.recipe import assemble
from wemmu.recipes.staged import Staged, startable


def skeleton(run: StageRun) -> Staged:
    """Return the model of a stage, every weight on the meta device.

    Raises:
        BackboneError: if a backbone's directory is not in the published layout, or the VLM's weights are not those of
            its config.
    """
    check_backbones(run.backbones, run.recipe.backbones)
    given = run.backbones.directories(run.recipe.backbones)
    parts = {kind: _without_weights(directory, kind) for kind, directory in given.items()}
    with init_empty_weights():
        return assemble(run, **parts)[0]


def identities(run: StageRun) -> dict[str, str]:
    """Return the identity of each backbone's weights, as checkpoints record it."""
    given = run.backbones.directories(run.recipe.backbones)
    return {name: identity(directory) for name, directory in given.items()}


def shapes(model: Staged) -> dict[str, list[int]]:
    """Return canonical name -> shape of every tensor that a stage can train or a checkpoint can contain."""
    return {name: list(tensor.shape) for name, tensor in startable(model).items()}


def _without_weights(directory: Path, kind: str) -> nn.Module:
    if kind == VLM:
        return vlm_without_weights(directory)
    cls: Any = class_of(directory, kind)
    with init_empty_weights():
        model = cls.from_config(cls.load_config(directory))
    return FrozenVAE(model) if kind == AUTOENCODER else model
