"""The interface of a recipe for training, evaluation and tools."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import nn

from wemmu.backbones.cache import FeatureCache
from wemmu.backbones.full_precision import Sources
from wemmu.backbones.quantized import pack
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.weights import LoadReport, OnBlockLoaded, keep_local
from wemmu.checkpoint.adapters import is_adapter
from wemmu.config.buckets import RequestSizes
from wemmu.config.schema import Sampling, StageRun
from wemmu.parallel.topology import Topology
from wemmu.prompts import PromptEncoder
from wemmu.published.check import check_backbones
from wemmu.recipes.staged import Staged
from wemmu.sampling.request import GenerationRequest, OnImages, Response
from wemmu.types import Batch, LossFn, Prepared


class Recipe(ABC):
    """One stage's loaded model with its objective and its uses.

    model: its parameters have their canonical names. reports: field of `backbones` -> what was loaded; the names of
    that backbone's weights begin with the field, and weights of other names are new. caches: of frozen features, which
    remember nothing until training begins. token_px: side of a VLM token, px.
    vae: None where the recipe does without. loss: what an optimizer step minimises, one value per sample. period: steps
    that one `prepare` serves; checkpoints lie between. sizes: how it sizes the images of a request; None: inputs are
    cropped to the size of the output. checkpoints: how names of weights begin -> the checkpoint, whose names lack this
    beginning, that the recipe's config names for them.
    """

    model: Staged
    reports: Mapping[str, LoadReport]
    vae: FrozenVAE | None
    caches: tuple[FeatureCache, ...] = ()
    token_px: int
    loss: LossFn
    period = 1
    sizes: RequestSizes | None = None
    checkpoints: Mapping[str, Path] = MappingProxyType({})

    def __init__(
        self, run: StageRun, on_block_loaded: OnBlockLoaded | None = keep_local, device: torch.device | str = "cpu"
    ):
        """Load the model; `on_block_loaded` is called with each block as it gets its weights. device: where it will be.

        Without `on_block_loaded` what can be trained is left on the meta device. A recipe that loads its VLM whole
        does not call it.

        Raises:
            BackboneError: if a backbone cannot be loaded whole.
        """
        self._run, self._device = run, torch.device(device)
        check_backbones(run.backbones, run.recipe.backbones)
        self.encoder = PromptEncoder(run.backbones.vlm)
        self._load(on_block_loaded)

    @abstractmethod
    def _load(self, on_block_loaded: OnBlockLoaded | None) -> None:
        """Set the attributes of this class; see `__init__`."""

    @abstractmethod
    def sources(self, every: bool = False) -> Sources:
        """Return where its weights are in more precision than bfloat16, or where `every` one is; call once."""

    def widened(self) -> frozenset[str]:
        """Return the names of weights [D, 2 C, ...] whose second half of the channels the config adds."""
        return frozenset()

    def prepare(self, batches: Sequence[Batch], step: int) -> Prepared:
        """Return the micro-batches that `loss` takes; all ranks call it before each step's first forward pass.

        A function of the weights, the step and the samples, so that a run that resumes prepares the same.
        """
        return Prepared(batches)

    @abstractmethod
    def preview(self) -> tuple[Image.Image, int]:
        """Answer the fixed prompts of the config: return one sheet and the number of blank images."""

    @abstractmethod
    def respond(
        self, request: GenerationRequest, sampling: Sampling | None = None, on_images: OnImages | None = None
    ) -> list[Response]:
        """Answer a batch. sampling: None for the settings of the config. on_images: of recipes that draw in steps."""

    @staticmethod
    @abstractmethod
    def sampling(run: StageRun) -> dict[str, Any]:
        """Return the settings of `respond`, for the record of an evaluation."""

    @abstractmethod
    def validation(self, topology: Topology, device: torch.device | str) -> Callable[[], float]:
        """Return the validation loss on held-out records; all ranks call it, between steps."""

    def copying(self, topology: Topology, device: torch.device | str) -> Callable[[], Mapping[str, float]] | None:
        """Return what measures how many held-out edits are copies, as `validation`; None for a recipe without edits.

        Raises:
            ShardError: if no edit is held out.
        """
        return None


def recipe(
    run: StageRun, on_block_loaded: OnBlockLoaded | None = keep_local, device: torch.device | str = "cpu"
) -> Recipe:
    """Load the recipe of a stage. Raises as `Recipe.__init__`."""
    return recipe_class(run)(run, on_block_loaded, device)


def assemble(run: StageRun, **backbones: nn.Module) -> tuple[Staged, LossFn]:
    """Build the model of a stage and its loss on `backbones` without weights: field of `backbones` -> model."""
    made: tuple[Staged, LossFn] = import_module(f"wemmu.recipes.{run.recipe.kind}.build").assemble(run, **backbones)
    return made


def recipe_class(run: StageRun) -> type[Recipe]:
    found: type[Recipe] = import_module(f"wemmu.recipes.{run.recipe.kind}.recipe").RECIPE
    return found


def ready_to_train(made: Recipe, run: StageRun) -> None:
    """Unfreeze what the stage trains; turn on checkpointing and caches if the config says so."""
    made.model.ready_to_train(run.stage.trains, run.memory.checkpointing)
    for cache in made.caches:
        cache.capacity = run.memory.cached_images


def quantize(run: StageRun, model: Staged, but: Collection[str] = ()) -> None:
    """Pack the frozen parts of `memory.quantize`, without those that hold weights of the names in `but`.

    Raises:
        BackboneError: if bitsandbytes is not installed.
    """
    for part, kind in run.memory.quantize.items():
        for path in run.recipe.quantizable[part]:
            if not any(name.startswith(f"{path}.") and not is_adapter(name) for name in but):
                pack(model.get_submodule(path), kind)


def identities(made: Recipe) -> dict[str, str]:
    """Return backbone -> identity of its loaded weights."""
    return {name: report.sha256 for name, report in made.reports.items()}
