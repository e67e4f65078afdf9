"""An exported pipeline as the initial model of a curriculum, from its small files. Free of torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wemmu.config.neighbours import instead

INDEX, PARITY = "model_index.json", "parity.json"
# Field of `backbones` -> its folder in an export; the bridge has one, too.
FOLDERS = {"vlm": "vlm", "vae": "vae", "dit": "transformer"}
BRIDGE, PROCESSOR = "bridge", "processor"
# Field of `sampling` -> argument of a call of the pipeline, whose default stands in model_index.json by that name.
ARGUMENTS = {
    "steps": "num_inference_steps",
    "solver": "solver",
    "t2i": "t2i_guidance_scale",
    "image": "image_guidance_scale",
    "instruction": "instruction_guidance_scale",
    "multi": "multi_guidance_scale",
}


def is_export(directory: Path) -> bool:
    """Return whether `wemmu export` wrote a pipeline into this directory."""
    return (directory / INDEX).is_file() and (directory / BRIDGE).is_dir()


def processor_folder(vlm: Path) -> Path:
    """Return the folder of the files that write a VLM's prompts: its own, or in an export the one beside it."""
    own = any((vlm / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    beside = vlm.parent / PROCESSOR
    return beside if not own and is_export(vlm.parent) and beside.is_dir() else vlm


def completed(tree: Mapping[str, Any], export: Path) -> dict[str, Any]:
    """Return the tree of a curriculum with what `export` says of the fields that it leaves out.

    These are the backbones, the bridge, the sampling settings, and of each stage the resolution and the timestep shift;
    the first stage starts from the exported weights.

    Raises:
        ValueError: if `export` is not an exported pipeline or lacks what the curriculum does not name.
    """
    stages = tree.get("stages")
    if not (isinstance(stages, list) and stages and all(isinstance(stage, dict) for stage in stages)):
        return dict(tree)
    # A resolved config needs nothing, also where the export is gone.
    if "backbones" in tree and all("start" in stage and "objective" in stage for stage in stages):
        return dict(tree)
    if not is_export(export):
        raise ValueError(
            f"export: {export} is not an exported pipeline (it has no {INDEX} and {BRIDGE}/); `wemmu export RUN --out "
            f"DIR` writes one{instead(export, 'export')}"
        )
    backbones = {name: str(export / folder) for name, folder in FOLDERS.items()} | (tree.get("backbones") or {})
    if not Path(backbones["vlm"]).is_dir():
        raise ValueError(
            f"export: {backbones['vlm']} is not a directory; if {export} was written without its VLM, set "
            "backbones.vlm to the VLM that its README.md names"
        )
    index = _read(export / INDEX, "resolution")
    bridge = _read(export / BRIDGE / "config.json", "bridge")["bridge"]
    if bridge.get("source_latents") and "dit" not in (tree.get("backbones") or {}):
        raise ValueError(
            f"export: the DiT of {export} has input channels for recipe.bridge.source_latents, so it is no "
            "start for others; set backbones.dit to the DiT that its training started from"
        )
    # How its run trained, not what the model is: RecA's would take the VAE branch from every later reconstruction.
    bridge.pop("reconstruct_without_vae", None)
    px = index["resolution"]
    time = {
        "shift": _read(export / "scheduler" / "scheduler_config.json", "shift")["shift"],
        "reference_resolution": px,
    }
    whole: dict[str, Any] = {
        "backbones": backbones,
        "recipe": _filled({"kind": "wemmu", "bridge": bridge}, tree.get("recipe")),
        "sampling": {field: index[name] for field, name in ARGUMENTS.items() if name in index}
        | (tree.get("sampling") or {}),
        "stages": [
            {"resolution": px} | stage | {"objective": _filled({"kind": "flow", "time": time}, stage.get("objective"))}
            for stage in stages
        ],
    }
    whole["stages"][0].setdefault("start", str(export))
    return {**tree, **whole}


def _filled(told: Any, given: Any) -> Any:
    """Return `given` with what `told` says of the fields, at any depth, that it leaves out; None leaves out all."""
    if given is None:
        return told
    if not (isinstance(told, Mapping) and isinstance(given, Mapping)):
        return given
    return {**told, **{name: _filled(told.get(name), value) for name, value in given.items()}}


def _read(file: Path, needed: str) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"export: {file} cannot be read: {error}") from error
    if not isinstance(found, dict) or needed not in found:
        raise ValueError(f"export: {file} has no field {needed}; export the run again with `wemmu export`")
    return found
