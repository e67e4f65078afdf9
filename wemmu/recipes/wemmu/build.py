"""Builds the model of WeMMU: the bridge copies the VLM's layers; the rest of it is new."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoImageProcessor

from wemmu.backbones.adapters import adapter_of
from wemmu.backbones.full_precision import LANGUAGE, Made, Sources, Widened, stored_dit, stored_vlm
from wemmu.backbones.vae import FrozenVAE
from wemmu.backbones.vlm import FrozenVLM
from wemmu.backbones.weights import (
    LoadReport,
    OnBlockLoaded,
    fill,
    keep_local,
    load_autoencoder,
    load_dit,
    load_vlm,
)
from wemmu.config.exported import processor_folder
from wemmu.config.schema import Backbones, StageRun
from wemmu.published.check import check_backbones
from wemmu.recipes.wemmu.bridge import Bridge
from wemmu.recipes.wemmu.config import Bridge as BridgeConfig
from wemmu.recipes.wemmu.config import WeMMU as WeMMUConfig
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.recipes.wemmu.model import WeMMU


def build_model(
    backbones: Backbones, config: BridgeConfig, seed: int, on_block_loaded: OnBlockLoaded | None = keep_local
) -> tuple[WeMMU, dict[str, LoadReport]]:
    """Return the whole model: load the backbones, copy the bridge from the VLM, initialise its new parts from `seed`.

    Without `on_block_loaded` the DiT and the bridge's copy stay on the meta device.

    Raises:
        BackboneError: if a backbone cannot be loaded whole.
    """
    dtype = getattr(torch, backbones.dtype)
    check_backbones(backbones, WeMMUConfig.backbones)
    reports = {}
    vlm, reports["vlm"] = load_vlm(backbones.vlm, dtype)
    assert backbones.vae is not None, "the config asks for it"
    vae, reports["vae"] = load_autoencoder(backbones.vae, dtype)
    assert backbones.dit is not None, "it was checked"
    dit, reports["dit"] = load_dit(backbones.dit, dtype, on_block_loaded, config.source_latents)
    pixels = AutoImageProcessor.from_pretrained(processor_folder(backbones.vlm), use_fast=True)
    frozen = FrozenVLM(vlm, pixels.image_mean, pixels.image_std)
    bridge = new_bridge(config, frozen.language_model, vae.latent_channels, caption_channels(dit), seed)
    bridge.to(frozen.vlm.dtype)
    # The pathway is a copy of a frozen model, but it learns.
    bridge.requires_grad_(True)
    if on_block_loaded is None:
        return WeMMU(frozen, vae, bridge, dit), reports
    for name in [*(f"layers.{i}" for i in range(len(frozen.language_model.layers))), "norm"]:
        block, original = bridge.pathway.get_submodule(name), frozen.language_model.get_submodule(name)
        fill(block, {name: tensor.clone() for name, tensor in original.state_dict().items()})
        on_block_loaded(f"bridge.pathway.{name}.", block)
    on_block_loaded("bridge.", bridge)
    return WeMMU(frozen, vae, bridge, dit), reports


def assemble(run: StageRun, vlm: Any, vae: FrozenVAE, dit: nn.Module) -> tuple[WeMMU, FlowMatchingLoss]:
    """Build the model and its loss on backbones without weights, to measure it or for its names, shapes and configs."""
    frozen = FrozenVLM(vlm, [0.5] * 3, [0.5] * 3)
    assert isinstance(run.recipe, WeMMUConfig)
    if run.recipe.bridge.source_latents:
        adapter_of(dit).widen(dit)
    bridge = Bridge(run.recipe.bridge, frozen.language_model, vae.latent_channels, caption_channels(dit))
    model = WeMMU(frozen, vae, bridge.to(vlm.dtype), dit)
    return model, FlowMatchingLoss(model, run)


def new_bridge(
    config: BridgeConfig, language_model: nn.Module, latent_channels: int, caption_channels: int, seed: int
) -> Bridge:
    """Return a float32 bridge initialised from `seed`; its copy of the layers is still on the meta device."""
    with torch.random.fork_rng(devices=[]):
        with init_empty_weights():
            skeleton = type(language_model)(language_model.config)
        torch.manual_seed(seed)
        return Bridge(config, skeleton, latent_channels, caption_channels)


def caption_channels(dit: nn.Module) -> int:
    """Return the condition's channels of a DiT."""
    return adapter_of(dit).caption_channels(dit)


def sources(backbones: Backbones, config: BridgeConfig, seed: int, model: WeMMU, every: bool = False) -> Sources:
    """Return where the weights of DiT and bridge of `model` have more precision than bfloat16, by canonical name.

    every: also those that the files hold in bfloat16.
    """
    pathway = {
        f"bridge.pathway.{name.removeprefix(LANGUAGE)}": source
        for name, source in stored_vlm(backbones.vlm, every).items()
        if name.startswith(LANGUAGE)
    }
    # The same draws again.
    new = new_bridge(config, model.vlm.language_model, model.vae.latent_channels, model.caption_channels, seed)
    made: Mapping[str, Made] = {f"bridge.{n}": Made(p.detach()) for n, p in new.named_parameters() if not p.is_meta}
    return {**pathway, **dit_sources(backbones, config, model, every), **made}


def dit_sources(backbones: Backbones, config: BridgeConfig, model: WeMMU, every: bool = False) -> Sources:
    """Return those of the DiT alone."""
    assert backbones.dit is not None, "the model has one"
    entry = adapter_of(model.dit).input_weight if config.source_latents else None
    return {
        f"dit.{name}": Widened(source) if name == entry else source
        for name, source in stored_dit(backbones.dit, every).items()
    }
