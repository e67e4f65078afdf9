"""A stage's model and batches without weights: the real classes, from the config.json files of the backbones."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from wemmu.backbones.adapters import class_of
from wemmu.backbones.encoders import encoder_without_weights
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.versions import vlm_config
from wemmu.backbones.vlm import VLM
from wemmu.backbones.weights import made_of
from wemmu.config.schema import StageRun
from wemmu.config.task import Task
from wemmu.positions import prompt_positions, token_grid
from wemmu.published import known
from wemmu.recipes.lora import adapt
from wemmu.recipes.recipe import assemble
from wemmu.recipes.staged import Staged
from wemmu.types import IGNORE_INDEX, Batch, Latents, LossFn, Negatives, Prompts


def make_model(run: StageRun) -> tuple[Staged, LossFn]:
    """Build the model of a stage, frozen as the stage says, and its loss; within a fake world it has no weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, run.backbones.dtype))
    try:
        given = run.backbones.directories(run.recipe.backbones)
        parts = {kind: make_backbone(directory, kind) for kind, directory in given.items()}
    finally:
        torch.set_default_dtype(before)
    model, loss = assemble(run, **parts)
    adapt(model, run.recipe, run.seed)
    model.ready_to_train(run.stage.trains, run.memory.checkpointing)
    return model, loss


def make_backbone(directory: Path, kind: str) -> nn.Module:
    """Build a new backbone in the default dtype.

    Raises:
        BackboneError: if its config.json does not describe one.
    """
    cls: Any = class_of(directory, kind)
    with made_of(directory, cls.__name__):
        if kind == known.VLM:
            model: nn.Module = cls(vlm_config(cls, directory))
        else:
            model = cls.from_config(cls.load_config(directory))
    return FrozenVAE(model) if kind == known.AUTOENCODER else model


def add_encoders(model: Staged, run: StageRun, folder: Path) -> None:
    """Put the recipe's frozen encoders into the model; `folder` has a directory for each. They are only counted."""
    for path in run.recipe.encoders:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, encoder_without_weights(folder / path).requires_grad_(False))


def vlm_of(model: Staged) -> VLM:
    vlm = model if isinstance(model, VLM) else model.vlm
    assert isinstance(vlm, VLM)
    return vlm


def vae_of(model: Staged) -> FrozenVAE:
    vae = model.vae
    assert isinstance(vae, FrozenVAE)
    return vae


def make_batch(model: Staged, run: StageRun, shape: dict[str, Any]) -> Batch:
    """Build a micro-batch as `wemmu.planning.ask.Shape` describes it; of padded prompts the first one is shorter.

    The contrastive partner of the last sample is in another micro-batch, as in the loader's.
    """
    vlm = vlm_of(model)
    samples, height, width = shape["samples"], shape["height"], shape["width"]
    grid, count = token_grid(height, width, vlm.token_px), shape["images"]
    ids = [0] * shape["text"]
    middle = len(ids) // 2
    for _ in range(count):
        # A word between images, or they would be one.
        ids[middle:middle] = [vlm.image_token_id] * (grid[0] * grid[1])
        middle += grid[0] * grid[1] + 1
    positions, following = prompt_positions(ids, vlm.image_token_id, [grid] * count)
    mask = torch.ones(samples, len(ids), dtype=torch.bool)
    mask[0, -1] = not shape["padded"]
    prompts = Prompts(
        torch.tensor(ids).repeat(samples, 1), mask, positions[:, None].repeat(1, samples, 1),
        torch.full((samples,), following), shape["padded"], (count * grid[0] * grid[1],) * samples,
    )  # fmt: skip
    # Empty, and so without numbers in a fake world: what is made of them takes no time.
    images = torch.empty(samples, count, 3, height, width).to(torch.uint8)
    sample_ids, task = torch.arange(samples), Task(shape["task"])
    if task in (Task.UNDERSTANDING, Task.CAPTION):
        labels = torch.full_like(prompts.input_ids, IGNORE_INDEX)
        labels[:, -1 - shape["answer"] : -1] = 0
        return Batch(task, sample_ids, prompts, images, None, labels=labels)
    target = torch.empty(samples, 3, height, width).to(torch.uint8)
    latents = None
    if shape["stored"]:
        channels, px = vae_of(model).latent_channels, vae_of(model).latent_px
        of_target = torch.zeros(samples, channels, height // px, width // px, dtype=torch.bfloat16)
        latents = Latents(of_target, of_target[:, None].repeat(1, count, 1, 1, 1))
    negatives = None
    if run.stage.objective.pairs:
        partner = None if latents is None else latents.target[:1]
        negatives = Negatives(torch.arange(samples) + 1, torch.tensor([samples]), target[:1], partner)
    return Batch(task, sample_ids, prompts, images, target, latents, negatives)
