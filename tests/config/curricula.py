"""A small valid curriculum, as the tree that a YAML file holds, to be bent by tests."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

_TREE: dict[str, Any] = {
    "name": "small",
    "backbones": {"vlm": "vlm", "sana": "sana"},
    "data": {"shards": "shards"},
    "memory": {"micro_batch": 8, "reference_resolution": 64},
    "stages": [
        {
            "name": name,
            "resolution": 64,
            "steps": 100,
            "global_batch": 16,
            "trains": ["vae_branch", "pathway", "position_mlp"],
            "optimizer": {"lr": 0.001},
            "mixture": {"t2i": 0.5, "edit": 0.5},
        }
        for name in ("first", "second")
    ],
}


def tree() -> dict[str, Any]:
    return deepcopy(_TREE)


def write(directory: Path, content: Any, name: str = "curriculum.yaml") -> Path:
    file = directory / name
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file
