"""Says what a folder is that was given in place of another kind, and what to give instead. Free of torch."""

import re
import shlex
from pathlib import Path
from typing import Literal

Wanted = Literal["weights", "export", "shards", "backbone"]
_NEEDED = {
    "weights": "a checkpoint, shipped weights or an export",
    "export": "an export",
    "shards": "a data set",
    "backbone": "the folder of a model",
}


def instead(path: Path, wanted: Wanted) -> str:
    """Return a clause that names what `path` is and what to give instead; empty if it is nothing that is known here."""
    kind, runs = _kind(path)
    if not kind:
        return ""
    newest = max(runs, key=lambda file: file.stat().st_mtime_ns).parent if runs else None
    beside = path / "export"
    if wanted == "weights" and newest is not None:
        give = f"give its checkpoint {newest}"
    elif wanted == "export" and (beside / "model_index.json").is_file():
        give = f"give {beside}"
    elif wanted == "export" and newest is not None:
        give = f"`wemmu export {shlex.quote(str(path))} --out DIR` writes an export of it"
    else:
        give = f"give {_NEEDED[wanted]}"
    return f"; {path} is {kind}: {give}"


def _kind(path: Path) -> tuple[str, list[Path]]:
    """Return what `path` is, "" if that is unknown, and the manifests of the checkpoints in it."""
    step = "step_????????/manifest.json"
    if path.is_file():
        return "a file", []
    if (path / "model_index.json").is_file():
        return "a pipeline", []
    if (path / "dataset.json").is_file():
        return "a data set", []
    if (path / "manifest.json").is_file():
        return "a checkpoint", [path / "manifest.json"]
    if (path / "config.yaml").is_file():
        return "a stage of a run", list(path.glob(f"checkpoints/{step}"))
    if (path / "curriculum.yaml").is_file():
        return "a run", list(path.glob(f"*/checkpoints/{step}"))
    if found := list(path.glob(step)):
        return "a folder of checkpoints", found
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
        return "not on this machine, and nothing here downloads from a hub", []
    return "", []
