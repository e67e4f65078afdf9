"""A small valid curriculum, as the tree that a YAML file holds, to be bent by tests."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

from wemmu.config import Curriculum, load_curriculum

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


def small_files_of_an_export(directory: Path) -> Path:
    """What a curriculum reads of an export, without weights."""
    files: dict[str, Any] = {
        "model_index.json": {"_class_name": "WeMMUPipeline", "resolution": 64, "num_inference_steps": 5},
        "bridge/config.json": {"bridge": {"position_table": 16}},
        "scheduler/scheduler_config.json": {"shift": 8.0},
        "vlm/config.json": {},
    }
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(json.dumps(content))
    return directory


def load_shipped(file: Path, export: Path) -> Curriculum:
    """A config of the repository; `export` is the place of the pipeline that some of them begin with."""
    begins = "export:" in file.read_text()
    return load_curriculum(file, [f"export={small_files_of_an_export(export)}"] if begins else [])
