"""An exported pipeline -> weights to start a stage from: the way back."""

import json
from pathlib import Path
from typing import Any

import torch

from tools.export.report import FILE, ParityError
from tools.export.stored import DIFFUSERS_FILE, Stored, published
from wemmu.checkpoint.finite import narrowed
from wemmu.checkpoint.manifest import FORMAT, Manifest, sha256_of, write_manifest
from wemmu.checkpoint.store import SHIPPED
from wemmu.checkpoint.stream import write_safetensors
from wemmu.recipes.wemmu.component import COMPONENTS


def ship_export(export: Path, out: Path, dtype: torch.dtype) -> None:
    """Write the weights in `export` that a stage can start from, as `wemmu.checkpoint.stored.ship` does.

    A DiT that was never trained is the backbone's and is left out, as in the checkpoint that was exported.

    Raises:
        ParityError: naming a file that is not as it was exported.
        ValueError: if the export does not say what it was made of.
    """
    if not (export / FILE).is_file():
        raise ValueError(f"{export} has no {FILE}, so it does not say what it was trained beside; give the run instead")
    report: dict[str, Any] = json.loads((export / FILE).read_text(encoding="utf-8"))
    origin = report["origin"]
    stored: dict[str, Stored] = {}
    for word, part in COMPONENTS.items():
        if word in origin["frozen"]:
            continue
        for name, sha256 in report["components"][part]["files"].items():
            if not (export / part / name).is_file() or sha256_of(export / part / name) != sha256:
                raise ParityError(f"{export / part / name} is not the file that was exported")
        stored |= {f"{word}.{name}": each for name, each in published(export / part, DIFFUSERS_FILE).items()}
    out.mkdir(parents=True, exist_ok=True)
    announced = {name: (dtype, each.shape) for name, each in stored.items()}
    write_safetensors(out / SHIPPED, announced, lambda name: narrowed(name, stored[name].read(), dtype))
    write_manifest(
        out,
        Manifest(
            format=FORMAT,
            tensors={name: list(each.shape) for name, each in stored.items()},
            trained=[],
            files={SHIPPED: sha256_of(out / SHIPPED)},
            libraries=report["libraries"],
            **origin,
        ),
    )
