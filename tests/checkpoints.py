"""Reads whole checkpoints in tests."""

from pathlib import Path

from torch import Tensor

from wemmu.checkpoint import store
from wemmu.checkpoint.collective import all_ranks
from wemmu.checkpoint.manifest import Manifest, verify
from wemmu.checkpoint.state import TrainState
from wemmu.checkpoint.stored import StoredTensors


def load_weights(directory: Path) -> tuple[dict[str, Tensor], Manifest]:
    """The weights of a checkpoint, or weights shipped without moments, in float32; raises as `StoredTensors`."""
    stored = StoredTensors(directory)
    return {name: stored.read(name) for name in stored.manifest.tensors}, stored.manifest


def load_state(directory: Path, state: TrainState) -> Manifest:
    """Fill `state` from this checkpoint, as `store.load_newest` from the newest whole one."""
    manifest = verify(directory, all_ranks())
    store._fill(directory, manifest, state, all_ranks())
    return manifest
