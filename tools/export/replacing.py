"""Decides what an export may replace (an earlier one, if its folder holds nothing else) and replaces it atomically.

Free of torch, so bad input is refused at once.
"""

import glob
import json
import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wemmu.config.checkpoints import CHECKPOINTS, MANIFEST
from wemmu.config.exported import PARITY
from wemmu.config.files import naming, replace_text
from wemmu.locks import is_alive

PIPELINE = "WeMMUPipeline"
WEIGHTS = "weights.safetensors"
_FOLDERS = {"vlm", "processor", "transformer", "vae", "bridge", "scheduler"}
_SHOWN = 5
# As Rust prints it: "No space left on device (os error 28)", "Os { code: 28, kind: StorageFull, ... }".
_SYSTEM_ERROR = re.compile(r"(?:\(os error |Os \{ code: )(\d+)")


def is_pipeline(directory: Path) -> bool:
    """Return whether this is a pipeline that was exported here."""
    try:
        name = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return (name[-1] if isinstance(name, list) else name) == PIPELINE


def check_export(out: Path) -> None:
    """Raise ValueError unless `out` is free or an earlier export and nothing else."""
    if not (out.exists() or out.is_symlink()):
        return
    if not ((out / PARITY).is_file() or is_pipeline(out)):
        raise ValueError(f"{out} exists and is not an earlier export; give another name")
    written = _written(out)
    _refuse(out, [path for path in _files(out) if str(path) not in written])


def check_shipped(out: Path, source: Path) -> None:
    """Raise ValueError unless `out` is free or holds weights that were shipped earlier and are not the source."""
    if out.absolute().parent.name == CHECKPOINTS:
        raise ValueError(f"{out} is among a stage's checkpoints, and would look like one; give another folder")
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_dir() or out.resolve() == source.resolve():
        raise ValueError(f"{out} is {'the source itself' if out.is_dir() else 'not a folder'}; give another name")
    try:
        shipped = set(json.loads((out / MANIFEST).read_text(encoding="utf-8"))["files"]) == {WEIGHTS}
    except (OSError, ValueError, KeyError, TypeError):
        shipped = False
    ours = {MANIFEST, WEIGHTS} if shipped else set()
    _refuse(out, [path for path in _files(out) if str(path) not in ours])


@contextmanager
def aside(out: Path) -> Iterator[Path]:
    """Yield a new folder that replaces `out` if the block succeeds; otherwise remove it.

    Where `out` is a link, its target is replaced and the link stays. The new folder's name is this process's own; what
    a killed export on this host left under such a name is removed, or becomes `out` again if nothing else is.
    """
    out = out.resolve()
    mark = f".{out.name}.export-{socket.gethostname()}-"
    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f"{glob.escape(mark)}*"):
        process = left.name.removeprefix(mark).split(".")[0]
        if process.isdigit() and not is_alive(int(process)):
            if left.suffix == ".earlier" and not out.exists():
                # A kill between the two renames below.
                os.replace(left, out)
            shutil.rmtree(left, ignore_errors=True)
    new, earlier = (out.with_name(f"{mark}{os.getpid()}.{what}") for what in ("new", "earlier"))
    new.mkdir()
    try:
        with naming(new), _numbered():
            yield new
        if out.exists():
            os.replace(out, earlier)
        try:
            os.replace(new, out)
        except OSError:
            if earlier.exists():
                os.replace(earlier, out)
            raise
    finally:
        for left in (new, earlier):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _numbered() -> Iterator[None]:
    """Raise the operating system's error in place of what tokenizers and safetensors make of it."""
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and (found := _SYSTEM_ERROR.search(str(error))):
            number = int(found[1])
            raise OSError(number, os.strerror(number)) from error
        raise


def _refuse(out: Path, foreign: list[Path]) -> None:
    if foreign:
        named = sorted({str(path) if path.parts[0] in _FOLDERS else path.parts[0] for path in foreign})
        raise ValueError(
            f"{out} contains files that no export wrote ({', '.join(named[:_SHOWN])}); "
            "move them elsewhere, or give another name"
        )


def _files(out: Path) -> list[Path]:
    """All files, links and empty folders in it, by their paths in it."""
    found = (p for p in out.rglob("*") if p.is_symlink() or not p.is_dir() or not any(p.iterdir()))
    return [path.relative_to(out) for path in found]


def note_files(directory: Path) -> None:
    """Add the names of all files to the export's own report, so that `check_export` knows what replacing would lose."""
    report = json.loads((directory / PARITY).read_text(encoding="utf-8"))
    report["written"] = sorted(str(path) for path in _files(directory))
    replace_text(directory / PARITY, json.dumps(report, indent=1) + "\n")


def _written(out: Path) -> set[str]:
    """The files that an earlier export wrote, by its report; none if it does not say."""
    try:
        return set(json.loads((out / PARITY).read_text(encoding="utf-8"))["written"])
    except (OSError, ValueError, KeyError):
        return set()
