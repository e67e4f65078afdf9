"""An exported pipeline as weights to start from: a manifest of its bridge and its DiT, and the place of each tensor."""

import json
from pathlib import Path
from typing import Any

from wemmu.checkpoint.collective import CheckpointError
from wemmu.config.exported import BRIDGE, FOLDERS, PARITY, is_export
from wemmu.published.layout import DIFFUSERS, BackboneError, StoredTensor, tensors

# First word of the canonical names of weights -> the component of an exported pipeline that holds them.
COMPONENTS = {"bridge": BRIDGE, "dit": FOLDERS["dit"]}


def exported_tensors(export: Path, frozen: dict[str, str]) -> dict[str, StoredTensor]:
    """Return canonical name -> place of all that an export holds and training made; `frozen` names what it did not.

    Raises:
        CheckpointError: if a weight file is missing or broken.
    """
    try:
        return {
            f"{word}.{name}": tensor
            for word, folder in COMPONENTS.items()
            if word not in frozen
            for name, tensor in tensors(export / folder, DIFFUSERS).items()
        }
    except BackboneError as error:
        raise CheckpointError(f"{export} cannot be started from: {error}") from error


def read_export(export: Path) -> dict[str, Any]:
    """Return the fields of a `Manifest` of an export, from its parity.json.

    Raises:
        CheckpointError: if the export does not say what it was made of.
    """
    try:
        report = json.loads((export / PARITY).read_text(encoding="utf-8"))
        origin, components = report["origin"], report["components"]
        held = exported_tensors(export, origin["frozen"])
        words = {name.partition(".")[0] for name in held}
        files = {
            f"{COMPONENTS[word]}/{name}": sha256
            for word in words
            for name, sha256 in components[COMPONENTS[word]]["files"].items()
        }
        shapes = {name: list(tensor.shape) for name, tensor in held.items()}
        return {**origin, "tensors": shapes, "trained": [], "files": files, "libraries": report["libraries"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{export} has no readable {PARITY}, so its backbones are unknown ({error}); start from "
            "the run, or export it again"
        ) from error


def is_own(export: Path, part: str, directory: Path | None) -> bool:
    """Return whether a backbone's directory is the export's own."""
    own = export / FOLDERS.get(part, part)
    return directory is not None and is_export(export) and own.is_dir() and directory.resolve() == own.resolve()
