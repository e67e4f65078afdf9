"""Adapters (LoRA) among the weights of a checkpoint: their names, and how they are merged into the weights they adapt.

A checkpoint of a part that learns by adapters holds the adapters and not the weights, which are a backbone's. Where a
model without adapters is filled from it, each weight W becomes W + scale B A.
"""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from wemmu.checkpoint.sharded_tensor import ShardedTensor

A, B = ".lora_A.weight", ".lora_B.weight"


def is_adapter(name: str) -> bool:
    """Return whether `name` is the canonical name of an adapter's weight."""
    return name.endswith((A, B))


def to_merge(names: Collection[str], known: Collection[str]) -> dict[str, tuple[str, str]]:
    """Return weight -> its A and B, of the adapters in `names` that a model with the weights `known` does not have."""
    layers = [name.removesuffix(A) for name in names if name.endswith(A) and name not in known]
    return {f"{layer}.weight": (layer + A, layer + B) for layer in layers}


def scale_of(name: str, scales: Mapping[str, float]) -> float | None:
    """Return alpha / rank of the adapters of a weight; scales: how names begin -> it. None if it has none."""
    return next((scale for prefix, scale in scales.items() if name.startswith(prefix)), None)


@torch.no_grad()
def add_merged(into: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """Add scale B A to a live weight [out, in], whole or sharded."""
    for (row, column), part in ShardedTensor.of(into).parts:
        rows, columns = part.shape
        part.copy_(part.float() + (b[row : row + rows] @ a[:, column : column + columns] * scale).to(part.device))
