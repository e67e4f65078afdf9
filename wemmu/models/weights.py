"""Backbones from directories in the published layout: strict, with a report of what was loaded."""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from diffusers import AutoencoderDC, SanaTransformer2DModel
from torch import nn
from transformers import AutoImageProcessor, PreTrainedModel, Qwen2_5_VLForConditionalGeneration

from wemmu.config.schema import Backbones
from wemmu.config.schema import Bridge as BridgeConfig
from wemmu.models.bridge import Bridge
from wemmu.models.model import WeMMU
from wemmu.models.vae import FrozenVAE
from wemmu.models.vlm import FrozenVLM


@dataclass(frozen=True)
class LoadReport:
    """What one directory gave: parameters loaded, names missing and names left over, and the hash of its files."""

    source: str
    parameters: int
    sha256: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.source}: {self.parameters / 1e6:.2f} M parameters, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, sha256 {self.sha256[:12]}"
        )


def load_backbones(config: Backbones) -> tuple[FrozenVLM, FrozenVAE, SanaTransformer2DModel, list[LoadReport]]:
    """Load VLM, autoencoder and DiT.

    Raises:
        FileNotFoundError: if a directory is not in the published layout, naming what it lacks.
        ValueError: if any weight is missing, left over or of another shape: nothing is ever initialised at random.
    """
    dtype = getattr(torch, config.dtype)
    vlm, vlm_report = load_strict(Qwen2_5_VLForConditionalGeneration, config.vlm, dtype)
    vae, vae_report = load_strict(AutoencoderDC, config.sana / "vae", dtype)
    dit, dit_report = load_strict(SanaTransformer2DModel, config.sana / "transformer", dtype)
    pixels = AutoImageProcessor.from_pretrained(config.vlm, use_fast=True)
    frozen = FrozenVLM(vlm, pixels.image_mean, pixels.image_std)
    return frozen, FrozenVAE(vae), dit, [vlm_report, vae_report, dit_report]


def build_model(backbones: Backbones, bridge: BridgeConfig, seed: int) -> tuple[WeMMU, list[LoadReport]]:
    """The whole model: backbones loaded, bridge copied from the VLM and its new parts initialised from `seed`."""
    vlm, vae, dit, reports = load_backbones(backbones)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        part = Bridge(bridge, vlm.language_model, vae.latent_channels, dit.config.caption_channels)
    # The pathway is a copy of a frozen model: it must be told that it learns.
    part.requires_grad_(True)
    return WeMMU(vlm, vae, part, dit), reports


def load_strict(cls: type, directory: Path, dtype: torch.dtype) -> tuple[nn.Module, LoadReport]:
    """One model of transformers or diffusers from its directory, in safetensors; raises as `load_backbones`."""
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory} holds no config.json; it must be a {cls.__name__} in the published layout"
        )
    if issubclass(cls, PreTrainedModel):
        # Told to ignore another shape, transformers reports the name; else it raises without one.
        options = {"dtype": dtype, "ignore_mismatched_sizes": True}
    else:
        options = {"torch_dtype": dtype}
    model, info = cls.from_pretrained(directory, output_loading_info=True, use_safetensors=True, **options)
    problems = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
    report = LoadReport(
        str(directory),
        sum(p.numel() for p in model.parameters()),
        hash_files(directory),
        sorted(info["missing_keys"]),
        sorted(info["unexpected_keys"]),
    )
    if problems:
        raise ValueError(f"{report}; first of them: {', '.join(sorted(problems)[:5])}")
    return model, report


@cache
def hash_files(directory: Path) -> str:
    """SHA-256 over the weight files of a directory (name and content, in the order of their names)."""
    digest = hashlib.sha256()
    for file in sorted(directory.glob("*.safetensors")):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over named tensors: name, type, shape and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
