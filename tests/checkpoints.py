"""Reads whole checkpoints in tests."""

from pathlib import Path

from torch import Tensor

from wemmu.checkpoint.manifest import Manifest
from wemmu.checkpoint.stored import StoredTensors


def load_weights(directory: Path) -> tuple[dict[str, Tensor], Manifest]:
    """The weights of a checkpoint, or weights shipped without moments, in float32; raises as `StoredTensors`."""
    stored = StoredTensors(directory)
    return {name: stored.read(name) for name in stored.manifest.tensors}, stored.manifest
