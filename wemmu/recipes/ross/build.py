"""Builds the model of ROSS from the VLM and the autoencoder, with a new head."""

import torch
from torch import nn
from transformers import AutoImageProcessor

from wemmu.backbones.encoders import load_encoder
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.weights import LoadReport, load_autoencoder, load_vlm
from wemmu.config.exported import processor_folder
from wemmu.config.schema import Backbones, StageRun
from wemmu.recipes.ross.config import Features, Pixels
from wemmu.recipes.ross.config import Ross as RossConfig
from wemmu.recipes.ross.loss import ReconstructiveLoss
from wemmu.recipes.ross.model import Ross


def build_ross(backbones: Backbones, config: RossConfig, seed: int) -> tuple[Ross, dict[str, LoadReport]]:
    """Return the whole model; the head is initialised from `seed`, in float32 whatever the VLM's type.

    Raises:
        BackboneError: if a backbone cannot be loaded whole.
        ValueError: if the VLM lacks the layer in the config.
    """
    dtype = getattr(torch, backbones.dtype)
    reports = {}
    vlm, reports["vlm"] = load_vlm(backbones.vlm, dtype)
    vae = None
    if backbones.vae is not None:
        vae, reports["vae"] = load_autoencoder(backbones.vae, dtype)
    pixels = AutoImageProcessor.from_pretrained(processor_folder(backbones.vlm), use_fast=True)
    teacher = None
    if isinstance(config.target, Features):
        # In float32: what it makes are targets, and it is small beside the VLM.
        teacher = load_encoder(config.target.encoder)
        reports["teacher"] = teacher.report
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Ross(vlm, pixels.image_mean, pixels.image_std, vae, config, teacher)
    return model, reports


def assemble(run: StageRun, vlm: nn.Module, vae: FrozenVAE | None = None) -> tuple[Ross, ReconstructiveLoss]:
    """Build the model and its loss on backbones without weights, for measuring; see `wemmu.measuring`.

    A teacher of features is not measured: pixels stand in for what it makes.
    """
    assert isinstance(run.recipe, RossConfig)
    config = run.recipe
    if isinstance(config.target, Features):
        config = config.model_copy(update={"target": Pixels()})
    model = Ross(vlm, [0.5] * 3, [0.5] * 3, vae, config)
    return model, ReconstructiveLoss(model, run)
