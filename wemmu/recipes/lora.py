"""Adapters in a model: peft's layers around linear layers. Weights keep canonical names, adapters have peft's.

    dit.transformer_blocks.0.attn2.to_q.weight          frozen
    dit.transformer_blocks.0.attn2.to_q.lora_A.weight   [rank, in]
    dit.transformer_blocks.0.attn2.to_q.lora_B.weight   [out, rank]

In memory peft calls them `to_q.base_layer.weight` and `to_q.lora_A.default.weight`; `Staged.named_parameters` and
`Staged.get_parameter` translate.
"""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from wemmu.config.lora import LoRA
from wemmu.config.recipe import RecipeConfig
from wemmu.readable import valid
from wemmu.recipes.staged import Staged

# The adapters of the policy that a stage of UAE began with, beside those that learn.
REFERENCE = "reference"


@dataclass(frozen=True)
class Adapted:
    """The adapters of one module: how the names of its layers begin, the adapted ones of them, and alpha / rank."""

    prefix: str
    layers: frozenset[str]
    scale: float


def adapt(model: Staged, config: RecipeConfig, seed: int) -> None:
    """Give the layers in the config their adapters, initialised from `seed`: A as peft does, B with zeros.

    Raises:
        ValueError: for a target that no linear layer of the module matches, naming the layers that there are.
    """
    for module, lora in config.lora.items():
        root = config.modules[module][0].removesuffix(".")
        layers = chosen_layers(model.get_submodule(root), lora, module)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _inject(model.get_submodule(root), layers, lora)
        model.adapters[module] = Adapted(f"{root}.", frozenset(f"{root}.{layer}" for layer in layers), lora.scale)


def chosen_layers(root: nn.Module, lora: LoRA, module: str) -> list[str]:
    """Return the names within `root` of the layers that the config targets; raises as `adapt`."""
    # Not the weights' shapes: under ZeRO-3 they are [0].
    linear = {n: min(m.in_features, m.out_features) for n, m in root.named_modules() if isinstance(m, nn.Linear)}
    blocks = tuple(f"{name}." for name, part in root.named_modules() if isinstance(part, nn.ModuleList))
    for target in lora.targets:
        if not any(lora.matches(name, target) for name in linear):
            ends = dict.fromkeys(re.sub(r"^.*\.\d+\.(?=\D)", "", name) for name in linear)
            raise ValueError(
                f"recipe.lora.{module}.targets: no linear layer matches {target!r}; {valid(target, ends)}, or a "
                "pattern as layers.1?.*"
            )
    found = [
        name for name in linear
        if any(lora.matches(name, target) for target in lora.targets) or (not lora.targets and name.startswith(blocks))
    ]  # fmt: skip
    if lora.rank > (most := max(linear[name] for name in found)):
        raise ValueError(
            f"recipe.lora.{module}.rank {lora.rank} is more than the rank of its layers; valid: 1 to {most}"
        )
    return found


def _inject(root: nn.Module, layers: list[str], lora: LoRA, adapter: str = "default") -> None:
    # peft is slow to import, and most runs have no adapters.
    from peft import LoraConfig, inject_adapter_in_model

    # peft declares a whole number and takes any.
    alpha: Any = lora.scale * lora.rank
    config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=f"({'|'.join(map(re.escape, layers))})")
    with warnings.catch_warnings():
        # Of adapters beside others, which is what a reference is.
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        inject_adapter_in_model(config, root, adapter)


def add_reference(model: Staged, config: RecipeConfig, module: str) -> dict[str, nn.Parameter]:
    """Add frozen adapters beside those of a module; return them by the canonical names of these."""
    adapted, lora = model.adapters[module], config.lora[module]
    root = model.get_submodule(adapted.prefix.removesuffix("."))
    with torch.random.fork_rng(devices=[]):
        _inject(root, sorted(name.removeprefix(adapted.prefix) for name in adapted.layers), lora, REFERENCE)
    found = {}
    for layer in sorted(adapted.layers):
        part: Any = model.get_submodule(layer)
        for letter in ("lora_A", "lora_B"):
            weight = part.get_submodule(letter)[REFERENCE].weight
            found[f"{layer}.{letter}.weight"] = weight.requires_grad_(False)
    return found


@contextmanager
def as_it_began(model: Staged, module: str) -> Iterator[None]:
    """Run a module with its reference adapters, or, where it has none, with none at all."""
    layers: list[Any] = [model.get_submodule(name) for name in model.adapters[module].layers]
    # `set_adapter` would change which parameters learn, too.
    for layer in layers:
        layer._active_adapter = [REFERENCE]
    try:
        yield
    finally:
        for layer in layers:
            layer._active_adapter = ["default"]


@torch.no_grad()
def merge(model: Staged) -> None:
    """Add the adapters to the weights and take them away: the model computes the same without them."""
    for adapted in model.adapters.values():
        for name in adapted.layers:
            layer: Any = model.get_submodule(name)
            layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.get_base_layer())
    model.adapters.clear()
