"""Reads and compares whole checkpoints in tests."""

from collections.abc import Mapping
from pathlib import Path

import torch
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


def differing(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> list[str]:
    """The names of tensors that one of the two lacks or that are not equal bit for bit."""
    both = ours.keys() & theirs.keys()
    return sorted((ours.keys() ^ theirs.keys()) | {name for name in both if not torch.equal(ours[name], theirs[name])})
