"""The initial weights of a model in the full precision of their source.

A model is loaded in the type that it computes in. What is trained has float32 masters beside it, and these begin with
the values of the files, not with those that the working type left of them: in bfloat16 they would be up to 0.4 % off.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from wemmu.published.layout import DIFFUSERS, TRANSFORMERS, tensors

LANGUAGE, VISION = "model.language_model.", "model.visual."


@dataclass(frozen=True)
class Stored:
    """A tensor of a safetensors file, by its name there."""

    file: Path
    name: str

    def read(self, box: tuple[slice, ...]) -> Tensor:
        with safe_open(self.file, "pt") as file:
            return file.get_slice(self.name)[box] if box else file.get_tensor(self.name)


@dataclass(frozen=True)
class Made:
    """A tensor that no file holds."""

    tensor: Tensor

    def read(self, box: tuple[slice, ...]) -> Tensor:
        return self.tensor[box]


@dataclass(frozen=True)
class Widened:
    """A stored tensor with zeros behind it, see `with_zeros`."""

    stored: Stored

    def read(self, box: tuple[slice, ...]) -> Tensor:
        return with_zeros(self.stored.read(()))[box]


def with_zeros(weight: Tensor) -> Tensor:
    """Return [D, C, ...] as [D, 2 C, ...], for a layer that takes C more channels and does not use them yet."""
    return torch.cat([weight, torch.zeros_like(weight)], dim=1)


Sources = Mapping[str, Stored | Made | Widened]


def stored_vlm(directory: Path, every: bool = False) -> dict[str, Stored]:
    """Return a VLM's weights with more precision than bfloat16 in the files (or `every` weight), by names in memory."""
    return {in_memory(name): source for name, source in _stored(directory, TRANSFORMERS, every).items()}


def in_memory(name: str) -> str:
    """Return the name in memory of a VLM's tensor in a file; files have these or those of Qwen2.5-VL's publication."""
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith((LANGUAGE, VISION)):
        return LANGUAGE + name.removeprefix("model.")
    return name


def stored_dit(directory: Path, every: bool = False) -> dict[str, Stored]:
    """Return the weights of a DiT by their names, as `stored_vlm`."""
    return _stored(directory, DIFFUSERS, every)


def _stored(directory: Path, single: str, every: bool) -> dict[str, Stored]:
    found = tensors(directory, single)
    return {name: Stored(tensor.file, name) for name, tensor in found.items() if every or tensor.dtype != "BF16"}
