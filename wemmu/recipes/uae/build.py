"""Builds the auto-encoder: the policy from the VLM, and the frozen generator with the weights of the config."""

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoImageProcessor

from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.vlm import FrozenVLM
from wemmu.backbones.weights import LoadReport, load_vlm
from wemmu.checkpoint.manifest import read_manifest
from wemmu.checkpoint.start import fill_merged, start_from, verify_start
from wemmu.config.exported import processor_folder
from wemmu.config.schema import Backbones, StageRun
from wemmu.recipes.lora import adapt, add_reference
from wemmu.recipes.staged import startable
from wemmu.recipes.uae.config import UAE as UAEConfig
from wemmu.recipes.uae.config import FlowGRPO, UnifiedGRPO
from wemmu.recipes.uae.measured import Measured
from wemmu.recipes.uae.model import UAE
from wemmu.recipes.uae.reward import Pixels, encoders_of
from wemmu.recipes.wemmu.bridge import Bridge
from wemmu.recipes.wemmu.build import build_model, caption_channels
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.types import LossFn

# Names of the frozen copy -> of the policy, whose weights it begins with.
REFERENCE = {"language_model.": "vlm.model.language_model.", "lm_head.": "vlm.lm_head.", "dit.": "generator.dit."}


def build_uae(run: StageRun) -> tuple[UAE, dict[str, LoadReport]]:
    """Return the whole model.

    Raises:
        BackboneError: if a backbone or an encoder cannot be loaded whole.
        CheckpointError: if the generator's weights, or those that the reference begins with, do not fit.
    """
    config, backbones = run.recipe, run.backbones
    assert isinstance(config, UAEConfig)
    generator, reports = build_generator(backbones, config, run.seed)
    vlm, reports["vlm"] = load_vlm(backbones.vlm, getattr(torch, backbones.dtype))
    pixels = AutoImageProcessor.from_pretrained(processor_folder(backbones.vlm), use_fast=True)
    model = UAE(vlm, pixels.image_mean, pixels.image_std, generator, reference_of(run), encoders_of(run))
    adapt(model, config, run.seed)
    if (module := penalised(run)) is not None and run.stage.start is not None:
        fill_reference(model, run, module, reports)
    return model, reports


def penalised(run: StageRun) -> Literal["llm", "dit"] | None:
    """Return the module for whose distance from the stage's initial weights the loss has a penalty."""
    match run.stage.objective:
        case UnifiedGRPO(beta=beta) if beta > 0:
            return "llm"
        case FlowGRPO(beta=beta) if beta > 0:
            return "dit"
    return None


def reference_of(run: StageRun) -> Literal["llm", "dit"] | None:
    """Return the module of whose first weights a copy is kept; one with adapters is the same model with others."""
    module = penalised(run)
    return None if module in run.recipe.lora else module


def build_generator(backbones: Backbones, config: UAEConfig, seed: int) -> tuple[WeMMU, dict[str, LoadReport]]:
    """Return the frozen generator, and reports of its backbones and of itself under `generator`.

    Raises:
        BackboneError, CheckpointError: as `build_uae`.
    """
    source = config.generator.weights
    model, loaded = build_model(backbones, config.generator.bridge, seed)
    start_from(source, startable(model), {name: report.sha256 for name, report in loaded.items()})
    digest = hashlib.sha256(repr(sorted(read_manifest(source).files.items())).encode()).hexdigest()
    parameters = sum(p.numel() for p in model.parameters())
    # Its backbones too: it is another generator with another VLM or autoencoder.
    identity = hashlib.sha256("/".join([digest, *(r.sha256 for r in loaded.values())]).encode()).hexdigest()
    reports = {"vae": loaded["vae"], "generator": LoadReport(str(source), parameters, identity)}
    return model.eval().requires_grad_(False), reports


def fill_reference(model: UAE, run: StageRun, module: str, reports: Mapping[str, LoadReport]) -> None:
    """Give the reference what the stage starts with: the frozen copy its weights, or frozen adapters theirs.

    What is not inside is the backbone's already; without adapters inside the reference has none.

    Raises:
        CheckpointError: as `start_from`.
    """
    start = run.stage.start
    assert start is not None, "else the reference is what the backbones are"
    beside = {p: one.sha256 for p, one in reports.items() if p != "vae" or not run.stage.start_other_vae}
    manifest = verify_start(start, startable(model), beside, model.scales)
    if model.reference is None:
        if model.adapters[module].prefix in manifest.adapters:
            adapters = {name: p.detach() for name, p in add_reference(model, run.recipe, module).items()}
            fill_merged(start, manifest, adapters, manifest.tensors)
        return
    renamed = {
        new + name.removeprefix(old): parameter.detach()
        for name, parameter in model.reference.named_parameters()
        for old, new in REFERENCE.items()
        if name.startswith(old)
    }
    fill_merged(start, manifest, renamed, renamed)


def assemble(run: StageRun, vlm: Any, vae: FrozenVAE, dit: nn.Module) -> tuple[UAE, LossFn]:
    """Build the model and its learner on backbones without weights; see `wemmu.measuring`."""
    config = run.recipe
    assert isinstance(config, UAEConfig)
    frozen = FrozenVLM(deepcopy(vlm), [0.5] * 3, [0.5] * 3)
    bridge = Bridge(config.generator.bridge, frozen.language_model, vae.latent_channels, caption_channels(dit))
    generator = WeMMU(frozen, vae, bridge.to(vlm.dtype), dit)
    model = UAE(vlm, [0.5] * 3, [0.5] * 3, generator, reference_of(run), {"reward": Pixels()})
    return model, Measured(run, model)
