"""What a stage trains, before an engine takes it: one function for each kind of objective.

A recipe is all that the rest of training need know of a model; a further one is a function here and a case in `recipe`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import nn

from wemmu.config.schema import StageRun
from wemmu.models.full_precision import Sources, answering_sources, generation_sources
from wemmu.models.model import WeMMU
from wemmu.models.ross import Ross
from wemmu.models.vae import FrozenVAE
from wemmu.models.weights import LoadReport, Place, build_model, build_ross
from wemmu.prompts import PromptEncoder
from wemmu.sampling.answers import Answerer, answer_grid
from wemmu.sampling.grid import sample_grid
from wemmu.sampling.sampler import Sampler
from wemmu.training.losses import FlowMatchingLoss, ReconstructiveLoss
from wemmu.types import LossFn


@dataclass(frozen=True)
class Recipe:
    """A model, loaded and frozen but for what the stage trains, with its loss.

    identities: backbone -> SHA-256 of the weights it was loaded with. sources: where its weights are in more precision
    than it computes in, to be asked for once. new: prefixes of the names of weights that no
    backbone gave. language: the model for whose sizes kernels are chosen; normed: the parts whose norms get them;
    layers: what runs with gradients, one by one. draw: the fixed prompts of the config as the model answers them now,
    and how many pictures of that are blank.
    """

    model: nn.Module
    encoder: PromptEncoder
    reports: list[LoadReport]
    identities: dict[str, str]
    sources: Callable[[], Sources]
    loss: LossFn
    new: tuple[str, ...]
    language: nn.Module
    normed: tuple[nn.Module, ...]
    layers: tuple[nn.Module, ...]
    vae: FrozenVAE
    token_px: int
    draw: Callable[[], tuple[Image.Image, int]]


def recipe(run: StageRun, place: Place, device: torch.device) -> Recipe:
    """Load, freeze, and say how to train it; `place` is called with each block as it gets its weights.

    Raises:
        BackboneError: if a backbone cannot be loaded whole.
    """
    return (_answering if run.stage.reconstructs else _generating)(run, place, device)


def _generating(run: StageRun, place: Place, device: torch.device) -> Recipe:
    """A bridge between a frozen VLM and a DiT."""
    model, reports = build_model(run.backbones, run.bridge, run.seed, place)
    _ready(model, run)
    model.vlm.cache.capacity = run.memory.cached_pictures
    encoder, language = PromptEncoder(run.backbones.vlm), model.vlm.language_model
    sampler = Sampler(model, encoder, run.stage.objective.time.shift_at(run.stage.resolution), device=device)
    return Recipe(
        model=model,
        encoder=encoder,
        reports=reports,
        identities=identities_of(reports),
        sources=lambda: generation_sources(run.backbones, run.bridge, run.seed, model),
        loss=FlowMatchingLoss(model, run),
        new=("bridge.",),
        language=language,
        normed=(language, model.bridge.pathway),
        layers=(*model.bridge.pathway.layers, *model.dit.transformer_blocks),
        vae=model.vae,
        token_px=model.vlm.token_px,
        draw=lambda: sample_grid(sampler, run.sampling, run.stage.resolution),
    )


def _answering(run: StageRun, place: Place, device: torch.device) -> Recipe:
    """A VLM that learns to answer and, by a head, to restore the picture."""
    model, reports = build_ross(run.backbones, run.reconstruction, run.seed)
    _ready(model, run)
    encoder = PromptEncoder(run.backbones.vlm)
    answerer = Answerer(model, encoder, device=device)
    return Recipe(
        model=model,
        encoder=encoder,
        reports=reports,
        identities=identities_of(reports),
        sources=lambda: answering_sources(run.backbones),
        loss=ReconstructiveLoss(model, run),
        new=("head.",),
        language=model.language_model,
        normed=(model.language_model,),
        layers=tuple(model.language_model.layers),
        vae=model.vae,
        token_px=model.token_px,
        draw=lambda: answer_grid(answerer, run.sampling, run.stage.resolution),
    )


def _ready(model: WeMMU | Ross, run: StageRun) -> None:
    """Let learn what the stage trains, in the memory that the run has."""
    model.freeze_all_but(run.stage.trains)
    model.train()
    model.vae.cache.capacity = run.memory.cached_pictures
    if run.memory.checkpointing:
        model.checkpoint_activations()


def identities_of(reports: list[LoadReport]) -> dict[str, str]:
    """SHA-256 of each backbone's weights; of those there are, in the order in which they are loaded."""
    return {part: report.sha256 for part, report in zip(("vlm", "vae", "dit"), reports, strict=False)}


def untrained(run: StageRun) -> tuple[WeMMU | Ross, list[LoadReport]]:
    """The model alone, as the backbones and the seed give it."""
    if run.stage.reconstructs:
        return build_ross(run.backbones, run.reconstruction, run.seed)
    return build_model(run.backbones, run.bridge, run.seed)
