"""Compares the exported directory with checkpoint and backbones, tensor by tensor."""

import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from tools.export.stored import Stored, published, sha256_of_tensor
from wemmu.checkpoint.manifest import Manifest, sha256_of
from wemmu.checkpoint.store import LIBRARIES
from wemmu.config.exported import PARITY

FORMAT = 1


class ParityError(RuntimeError):
    """The export differs from the trained model."""


@dataclass
class Report:
    """The sources of an export and the results of the comparisons.

    ema: whether the weights are moving averages. origin: what the manifest of the checkpoint says of itself (stage,
    step, seed, resolution, frozen). components: name -> number of tensors and parameters, SHA-256 of its files, and how
    far its type moved the values. tensors: component -> name -> shape, type and SHA-256 of the stored values. outputs:
    how far the images of both models on the fixed requests are apart, or why they were not drawn. question: of a tuned
    VLM, what it is asked about an image that comes without words.
    """

    dtype: str
    ema: bool
    origin: dict[str, Any]
    components: dict[str, dict[str, Any]] = field(default_factory=dict)
    tensors: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    outputs: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=dict)
    question: str = ""

    @classmethod
    def of(cls, manifest: Manifest, dtype: str, ema: bool) -> "Report":
        kept = ("stage", "step", "seed", "resolution", "frozen", "layout")
        origin = {name: value for name, value in asdict(manifest).items() if name in kept}
        # Merged adapters make another DiT of it.
        trained = any(name.startswith("dit.") for name in manifest.tensors)
        origin["frozen"] = {name: sha256 for name, sha256 in manifest.frozen.items() if name != "dit" or not trained}
        libraries = ("safetensors", *LIBRARIES)
        versions = {"python": platform.python_version()} | {name: version(name) for name in libraries}
        return cls(dtype, ema, origin, libraries=versions)

    def write(self, directory: Path) -> None:
        (directory / PARITY).write_text(
            json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n", encoding="utf-8"
        )

    def lines(self) -> list[str]:
        """Return the printed summary."""
        rows = [f"{'component':12}{'tensors':>8}{'parameters':>15}{'rounded by':>12}  sha256 of the first file"]
        for name, facts in self.components.items():
            first = next(iter(facts["files"].values()))
            rows.append(
                f"{name:12}{facts['tensors']:8}{facts['parameters']:15,}{facts['rounded_by']:12.1e}  {first[:16]}"
            )
        rows += ["the weights are their moving averages (EMA)"] if self.ema else []
        return [*rows, "every tensor was read again from disk and equals its source", *self.outputs["lines"]]


def compare_component(
    report: Report, directory: Path, name: str, single: str, stored: Mapping[str, Stored], dtype: torch.dtype
) -> None:
    """Compare the component `name`, which lies in `directory`, with its source, and note its files and tensors."""
    report.tensors[name], rounded_by = compare_tensors(name, published(directory, single), stored, dtype)
    report.components[name] = {
        "tensors": len(stored),
        "parameters": sum(torch.Size(each.shape).numel() for each in stored.values()),
        "rounded_by": rounded_by,
        "files": {file.name: sha256_of(file) for file in sorted(directory.glob("*.safetensors"))},
    }


def compare_tensors(
    name: str, found: Mapping[str, Stored], stored: Mapping[str, Stored], dtype: torch.dtype
) -> tuple[dict[str, dict[str, Any]], float]:
    """Read every tensor that was `found` and its source, one at a time, and compare them.

    name: what they are part of. Returns shape, type and SHA-256 of each, and how far `dtype` moved a value at most.

    Raises:
        ParityError: naming the first tensor that is missing, left over or differs.
    """
    if odd := sorted(found.keys() ^ stored.keys()):
        raise ParityError(f"{name} has other tensors than its source, first {odd[0]}")
    notes, rounded_by = {}, 0.0
    for key, source in stored.items():
        original = source.read()
        rounded = original.to(source.in_export(dtype))
        digest = sha256_of_tensor(rounded)
        if rounded is not original:
            rounded_by = max(rounded_by, float((rounded.to(original.dtype) - original).abs().max()))
        del original, rounded
        tensor = found[key].read()
        if tuple(tensor.shape) != source.shape or tensor.dtype != source.in_export(dtype):
            raise ParityError(f"{name}: {key} is {tensor.dtype} {list(tensor.shape)}, its source {list(source.shape)}")
        if sha256_of_tensor(tensor) != digest:
            raise ParityError(f"{name} has other values than its source, first in {key} (SHA-256 {digest[:12]})")
        notes[key] = {"shape": list(source.shape), "dtype": str(tensor.dtype).removeprefix("torch."), "sha256": digest}
        del tensor
    return notes, rounded_by
