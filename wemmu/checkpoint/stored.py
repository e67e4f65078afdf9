"""Reads the weights of a checkpoint one at a time, for tools."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from wemmu.checkpoint.collective import ALONE, CheckpointError
from wemmu.checkpoint.finite import check_finite, narrowed
from wemmu.checkpoint.manifest import sha256_of, verify, write_manifest
from wemmu.checkpoint.metadata import CheckedReader
from wemmu.checkpoint.store import EMA, MOMENTS, SHIPPED, WEIGHTS, read, stored_weights, weight_prefixes
from wemmu.checkpoint.stream import write_safetensors
from wemmu.config.checkpoints import own_checkpoints


class StoredTensors:
    """The tensors of a checkpoint, shipped weights or an export, read one at a time by this process alone.

    manifest: of what was verified when this was made. ema: whether moving averages stand for the weights that have one.

    Raises:
        CheckpointError: if it is damaged or holds no averages and they are meant.
    """

    def __init__(self, directory: Path, ema: bool = False):
        self.manifest = verify(directory)
        self._prefixes = weight_prefixes(directory, self.manifest, ema)
        self._directory, self._places = directory, stored_weights(directory, self.manifest)
        self._reader = CheckedReader(directory / "state")

    def read(self, name: str, part: str = WEIGHTS) -> Tensor:
        """Return the whole tensor `name` in float32, or with `part` its moments, by the first word of their names.

        Raises:
            NotFiniteError: if it holds infinities or NaN.
        """
        if self._places is not None:
            file_name, key = self._places[name]
            # Opened for each: pages of an open file stay in memory.
            with safe_open(file_name, framework="pt") as file:
                tensor = file.get_tensor(key).float()
        else:
            tensor = torch.empty(self.manifest.tensors[name])
            prefix = self._prefixes[name] if part == WEIGHTS else part
            read(self._directory, {f"{prefix}.{name}": tensor}, ALONE, self._reader)
        check_finite(f"{self._directory} cannot be used", {name: tensor}, ALONE)
        return tensor


def newest_finite(root: Path) -> Path | None:
    """Return the newest whole and finite checkpoint under `root`; reads all of it, so use it for messages only."""
    for directory in reversed(own_checkpoints(root)):
        try:
            stored = StoredTensors(directory)
            kept = (*MOMENTS, EMA) if stored.manifest.ema else MOMENTS
            parts = {WEIGHTS: list(stored.manifest.tensors), **dict.fromkeys(kept, stored.manifest.trained)}
            for part, names in parts.items():
                for name in names:
                    stored.read(name, part)
        except CheckpointError:
            continue
        return directory
    return None


def export_weights(directory: Path, out: Path, dtype: torch.dtype = torch.float16, ema: bool = False) -> None:
    """Write the weights of a checkpoint, their averages, or those of an export as one file that a stage starts from."""
    stored = StoredTensors(directory, ema)
    out.mkdir(parents=True, exist_ok=True)
    announced = {name: (dtype, shape) for name, shape in stored.manifest.tensors.items()}
    write_safetensors(out / SHIPPED, announced, lambda name: narrowed(name, stored.read(name), dtype))
    write_manifest(out, replace(stored.manifest, trained=[], ema=False, files={SHIPPED: sha256_of(out / SHIPPED)}))
