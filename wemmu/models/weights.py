"""Backbones from directories in the published layout: strict, with a report of what was loaded.

What can be trained, the DiT and the bridge's copy of the VLM's layers, gets its weights block by block, and each block
is handed to `place` before the next one is read: a sharded engine never has the whole of it in memory.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderDC, ModelMixin, SanaTransformer2DModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoImageProcessor, PreTrainedModel, Qwen2_5_VLForConditionalGeneration

from wemmu.config.reconstruction import Reconstruction
from wemmu.config.schema import Backbones
from wemmu.config.schema import Bridge as BridgeConfig
from wemmu.models.bridge import Bridge
from wemmu.models.model import WeMMU
from wemmu.models.ross import Ross
from wemmu.models.vae import FrozenVAE
from wemmu.models.vlm import FrozenVLM
from wemmu.published.check import check, check_backbones
from wemmu.published.identity import identity, short
from wemmu.published.layout import DIFFUSERS, BackboneError, tensors

# Is called with a module that has just got its weights and the prefix of their names in the whole model. A module that
# contains others comes after them, and finds done to them what was done.
Place = Callable[[str, nn.Module], object]


@dataclass(frozen=True)
class LoadReport:
    """What one directory gave: parameters loaded, names missing and names left over, and what its weights are named.

    sha256: its `wemmu.published.identity`.
    """

    source: str
    parameters: int
    sha256: str
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.source}: {self.parameters / 1e6:.2f} M parameters, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected, sha256 {short(self.sha256)}"
        )


def stay(prefix: str, module: nn.Module) -> None:
    """The `Place` of a process that keeps the whole model."""


def load_backbones(
    config: Backbones, place: Place = stay
) -> tuple[FrozenVLM, FrozenVAE, SanaTransformer2DModel, list[LoadReport]]:
    """Load VLM, autoencoder and DiT.

    Raises:
        BackboneError: if a directory is not in the published layout, naming what it lacks, or any weight is missing,
            left over or of another shape: nothing is ever initialised at random.
    """
    dtype = getattr(torch, config.dtype)
    check_backbones(config)
    vlm, vlm_report = load_strict(Qwen2_5_VLForConditionalGeneration, config.vlm, dtype)
    vae, vae_report = load_strict(AutoencoderDC, config.sana / "vae", dtype)
    dit, dit_report = load_by_blocks(
        SanaTransformer2DModel, config.sana / "transformer", dtype, lambda prefix, block: place(f"dit.{prefix}", block)
    )
    pixels = AutoImageProcessor.from_pretrained(config.vlm, use_fast=True)
    frozen = FrozenVLM(vlm, pixels.image_mean, pixels.image_std)
    return frozen, FrozenVAE(vae), dit, [vlm_report, vae_report, dit_report]


def build_model(
    backbones: Backbones, bridge: BridgeConfig, seed: int, place: Place = stay
) -> tuple[WeMMU, list[LoadReport]]:
    """The whole model: backbones loaded, bridge copied from the VLM and its new parts initialised from `seed`."""
    vlm, vae, dit, reports = load_backbones(backbones, place)
    language_model = vlm.language_model
    part = new_bridge(bridge, language_model, vae.latent_channels, dit.config.caption_channels, seed)
    part.to(vlm.vlm.dtype)
    # The pathway is a copy of a frozen model: it must be told that it learns.
    part.requires_grad_(True)
    for name in [*(f"layers.{i}" for i in range(len(language_model.layers))), "norm"]:
        block, original = part.pathway.get_submodule(name), language_model.get_submodule(name)
        fill(block, {name: tensor.clone() for name, tensor in original.state_dict().items()})
        place(f"bridge.pathway.{name}.", block)
    place("bridge.", part)
    return WeMMU(vlm, vae, part, dit), reports


def new_bridge(
    config: BridgeConfig, language_model: nn.Module, latent_channels: int, caption_channels: int, seed: int
) -> Bridge:
    """A float32 bridge as `seed` initialises it; its copy of the language model's layers is without memory yet."""
    with torch.random.fork_rng(devices=[]):
        with init_empty_weights():
            skeleton = type(language_model)(language_model.config)
        torch.manual_seed(seed)
        return Bridge(config, skeleton, latent_channels, caption_channels)


def build_ross(backbones: Backbones, config: Reconstruction, seed: int) -> tuple[Ross, list[LoadReport]]:
    """A VLM that is tuned, the autoencoder that makes its targets, and a head initialised from `seed`; no DiT.

    The head is float32 whatever the VLM is. Raises as `load_backbones`, and ValueError if the VLM has no such layer as
    the config names.
    """
    dtype = getattr(torch, backbones.dtype)
    check_backbones(backbones, with_dit=False)
    vlm, vlm_report = load_strict(Qwen2_5_VLForConditionalGeneration, backbones.vlm, dtype)
    vae, vae_report = load_strict(AutoencoderDC, backbones.sana / "vae", dtype)
    pixels = AutoImageProcessor.from_pretrained(backbones.vlm, use_fast=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Ross(vlm, pixels.image_mean, pixels.image_std, FrozenVAE(vae), config)
    return model, [vlm_report, vae_report]


def fill(block: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Give a block of a model without memory its weights, by name: those that it has not yet."""
    block.load_state_dict(tensors, strict=False, assign=True)
    assert not any(tensor.is_meta for tensor in block.state_dict().values())


def load_strict(cls: type, directory: Path, dtype: torch.dtype) -> tuple[nn.Module, LoadReport]:
    """One model of transformers or diffusers from its directory, in safetensors; raises as `load_backbones`."""
    check(directory, cls.__name__)
    if issubclass(cls, PreTrainedModel):
        # Told to ignore another shape, transformers reports the name; else it raises without one.
        options = {"dtype": dtype, "ignore_mismatched_sizes": True}
    else:
        options = {"torch_dtype": dtype}
    try:
        model, info = cls.from_pretrained(directory, output_loading_info=True, use_safetensors=True, **options)
    except (ValueError, RuntimeError) as error:
        raise BackboneError(f"{directory} cannot be loaded as a {cls.__name__}: {error}") from error
    parameters = sum(p.numel() for p in model.parameters())
    mismatched = list(map(str, info["mismatched_keys"]))
    return model, _report(directory, parameters, info["missing_keys"], info["unexpected_keys"], mismatched)


def load_by_blocks(
    cls: type[ModelMixin], directory: Path, dtype: torch.dtype, place: Place
) -> tuple[nn.Module, LoadReport]:
    """As `load_strict`, of a diffusers model, but block by block; all of it is checked before a weight is read."""
    check(directory, cls.__name__)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with init_empty_weights():
            model = cls.from_config(cls.load_config(directory))
    finally:
        torch.set_default_dtype(default)
    model.register_to_config(_name_or_path=directory)
    files = stored_files(directory)
    opened = {file: safe_open(file, "pt") for file in set(files.values())}
    stored = {name: opened[file] for name, file in files.items()}
    expected = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    shapes = {name: file.get_slice(name).get_shape() for name, file in stored.items()}
    report = _report(
        directory,
        sum(p.numel() for p in model.parameters()),
        expected.keys() - shapes.keys(),
        shapes.keys() - expected.keys(),
        [name for name, shape in shapes.items() if name in expected and shape != expected[name]],
    )
    for prefix, block in blocks(model):
        empty = [name for name, tensor in block.state_dict().items() if tensor.is_meta]
        fill(block, {name: stored[prefix + name].get_tensor(prefix + name).to(dtype) for name in empty})
        place(prefix, block)
    return model.eval(), report


def blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Parts of a model, by prefix, that together have all of its weights: its lists' elements, its other children.

    The model itself comes last, with the prefix "", for the weights that are in none of its children.
    """
    for name, child in model.named_children():
        parts = child.named_children() if isinstance(child, nn.ModuleList) else [("", child)]
        yield from ((".".join(filter(None, (name, part))) + ".", block) for part, block in parts)
    yield "", model


def stored_files(directory: Path, single: str = DIFFUSERS) -> dict[str, Path]:
    """Name -> the file that holds this tensor; of the two published layouts, one file or several with an index.

    single: the one file's name, which is diffusers' unless given.

    Raises:
        BackboneError: if the directory has neither, or not all of one.
    """
    return {name: tensor.file for name, tensor in tensors(directory, single).items()}


def _report(
    directory: Path, parameters: int, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]
) -> LoadReport:
    """Raises BackboneError unless the weights fit."""
    report = LoadReport(str(directory), parameters, identity(directory), sorted(missing), sorted(unexpected))
    if problems := sorted([*report.missing, *report.unexpected, *mismatched]):
        raise BackboneError(f"{report}; first of them: {', '.join(problems[:5])}")
    return report


def hash_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> str:
    """SHA-256 over named tensors: name, type, shape and bytes, in the order of their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
