"""The model of a stage without memory: names, shapes and configs, from the backbones' directories alone."""

from accelerate import init_empty_weights

from wemmu.backbones.weights import vlm_without_weights
from wemmu.config import StageRun
from wemmu.measuring.model import make_backbone
from wemmu.published.check import check_backbones
from wemmu.published.identity import identity
from wemmu.published.known import VLM
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
    vlm = vlm_without_weights(given.pop(VLM))
    with init_empty_weights():
        return assemble(run, vlm=vlm, **{kind: make_backbone(directory, kind) for kind, directory in given.items()})[0]


def identities(run: StageRun) -> dict[str, str]:
    """Return the identity of each backbone's weights, as checkpoints record it."""
    given = run.backbones.directories(run.recipe.backbones)
    return {name: identity(directory) for name, directory in given.items()}


def shapes(model: Staged) -> dict[str, list[int]]:
    """Return canonical name -> shape of every tensor that a stage can train or a checkpoint can contain."""
    return {name: list(tensor.shape) for name, tensor in startable(model).items()}
