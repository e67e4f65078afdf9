"""The weights of a checkpoint one at a time, for tools: what is read is let go before the next is."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from wemmu.training.checkpoint import MOMENTS, SHIPPED, WEIGHTS, read
from wemmu.training.collective import ALONE, CheckpointError
from wemmu.training.finite import check_finite
from wemmu.training.manifest import sha256_of, verify, write_manifest
from wemmu.training.metadata import CheckedReader
from wemmu.training.stream import write_safetensors


class StoredTensors:
    """What lies in a checkpoint or in shipped weights, one tensor at a time, by this process alone.

    manifest: of what was verified when this was made.

    Raises:
        CheckpointError: if it is damaged.
    """

    def __init__(self, directory: Path):
        self.manifest = verify(directory)
        self._directory, self._shipped = directory, (directory / SHIPPED).is_file()
        self._reader = CheckedReader(directory / "state")

    def read(self, name: str, part: str = WEIGHTS) -> Tensor:
        """The whole tensor `name` in float32; `part`: its moments instead, by the first word of their names.

        Raises:
            NotFiniteError: if it holds infinities or NaN.
        """
        if self._shipped:
            with safe_open(self._directory / SHIPPED, framework="pt") as file:
                tensor = file.get_tensor(name).float()
        else:
            tensor = torch.empty(self.manifest.tensors[name])
            read(self._directory, {f"{part}.{name}": tensor}, ALONE, self._reader)
        check_finite(f"{self._directory} cannot be used", {name: tensor}, ALONE)
        return tensor


def newest_finite(root: Path) -> Path | None:
    """The newest checkpoint under `root` that is whole and finite; reads all of it, so it is for messages."""
    for directory in sorted(root.glob("step_" + "[0-9]" * 8), reverse=True):
        try:
            stored = StoredTensors(directory)
            parts = {WEIGHTS: list(stored.manifest.tensors), **dict.fromkeys(MOMENTS, stored.manifest.trained)}
            for part, names in parts.items():
                for name in names:
                    stored.read(name, part)
        except CheckpointError:
            continue
        return directory
    return None


def ship(directory: Path, out: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the weights of a checkpoint, without moments, as one small file that a stage can start from."""
    stored = StoredTensors(directory)
    out.mkdir(parents=True, exist_ok=True)
    announced = {name: (dtype, shape) for name, shape in stored.manifest.tensors.items()}
    write_safetensors(out / SHIPPED, announced, lambda name: stored.read(name).to(dtype))
    write_manifest(out, replace(stored.manifest, trained=[], files={SHIPPED: sha256_of(out / SHIPPED)}))
