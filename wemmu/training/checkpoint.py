"""Checkpoints: torch's distributed format under canonical names, with a manifest, appearing by rename.

    checkpoints/step_00001300/
        manifest.json     what is inside: modules, shapes, hashes of every file, step, data position, versions
        state/            DCP: model.<name>, exp_avg.<name>, exp_avg_sq.<name>

Inside are the weights the stage trains, with their moments, and those it only carries from an earlier stage. Frozen
backbones are not inside; the manifest names them by hash. A checkpoint is written aside and renamed when its
manifest is on disk, so that whatever carries the name is whole; DCP has no checksums, so the manifest has.
"""

import hashlib
import json
import os
import platform
import shutil
import warnings
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.api import CheckpointException

from wemmu.parallel.engine import TrainState

# One process is what `no_dist` asks for; torch warns of it at every save and load all the same.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

FORMAT = 1
SHIPPED = "weights.safetensors"
LIBRARIES = ("torch", "transformers", "diffusers", "mosaicml-streaming")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the directory, the reason and what to do."""


@dataclass(frozen=True)
class Manifest:
    """step: optimizer steps taken, which is also the data position. seed: with it, the key of all randomness.

    tensors: name -> shape of every weight inside. trained: those of them that have moments. frozen: backbone -> SHA-256
    of the weights it was trained beside. files: path within the checkpoint -> SHA-256.
    """

    format: int
    stage: str
    step: int
    seed: int
    resolution: int
    tensors: dict[str, list[int]]
    trained: list[str]
    frozen: dict[str, str]
    files: dict[str, str]
    libraries: dict[str, str]


def directory_name(step: int) -> str:
    return f"step_{step:08d}"


def save(
    root: Path,
    state: TrainState,
    carried: dict[str, Tensor],
    *,
    stage: str,
    seed: int,
    resolution: int,
    frozen: dict[str, str],
) -> Path:
    """Write the checkpoint of `state` and of the weights it carries under `root`; returns its directory."""
    final = root / directory_name(state.steps)
    aside = root / f"{final.name}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    dcp.save(_flat(state, carried), checkpoint_id=aside / "state", no_dist=True)
    manifest = Manifest(
        format=FORMAT,
        stage=stage,
        step=state.steps,
        seed=seed,
        resolution=resolution,
        tensors={name: list(w.shape) for name, w in (state.weights | carried).items()},
        trained=sorted(state.weights),
        frozen=frozen,
        files={str(f.relative_to(aside)): _sha256(f) for f in sorted(aside.rglob("*")) if f.is_file()},
        libraries={"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    )
    with (aside / "manifest.json").open("w") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    if final.exists():
        # Only a checkpoint that failed verification is ever written again (`latest` passes over it).
        shutil.rmtree(final)
    os.replace(aside, final)
    return final


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest alone.

    Raises:
        CheckpointError: if there is none or it is of another format.
    """
    try:
        data = json.loads((directory / "manifest.json").read_text())
        manifest = Manifest(**data)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{directory} is not a checkpoint: its manifest.json cannot be read ({error})") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{directory} has checkpoint format {manifest.format}; this version reads {FORMAT}")
    return manifest


def verify(directory: Path) -> Manifest:
    """Compare every file with its hash.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    manifest = read_manifest(directory)
    for name, expected in manifest.files.items():
        file = directory / name
        if not file.is_file():
            raise CheckpointError(f"{directory}: the file {name} is missing; use another checkpoint")
        if _sha256(file) != expected:
            raise CheckpointError(
                f"{directory}: the file {name} is damaged (its SHA-256 differs); use another checkpoint"
            )
    return manifest


def load_state(directory: Path) -> tuple[TrainState, Manifest]:
    """Verify and read what training goes on from: the trained weights, their moments, the step."""
    manifest = verify(directory)

    def empty() -> dict[str, Tensor]:
        return {name: torch.empty(manifest.tensors[name]) for name in manifest.trained}

    state = TrainState(empty(), empty(), empty(), manifest.step)
    _read(directory, _flat(state, {}))
    return state, manifest


def load_weights(directory: Path) -> tuple[dict[str, Tensor], Manifest]:
    """Verify a checkpoint, or weights that were shipped without moments, and read all weights in float32."""
    manifest = verify(directory)
    if (directory / SHIPPED).is_file():
        return {name: w.float() for name, w in load_file(directory / SHIPPED).items()}, manifest
    weights = {name: torch.empty(shape) for name, shape in manifest.tensors.items()}
    _read(directory, {f"model.{name}": w for name, w in weights.items()})
    return weights, manifest


def ship(directory: Path, out: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write the weights of a checkpoint, without moments, as one small file that a stage can start from."""
    weights, manifest = load_weights(directory)
    out.mkdir(parents=True, exist_ok=True)
    save_file({name: w.to(dtype) for name, w in weights.items()}, out / SHIPPED)
    shipped = replace(manifest, trained=[], files={SHIPPED: _sha256(out / SHIPPED)})
    (out / "manifest.json").write_text(json.dumps(asdict(shipped), indent=1))


def latest(root: Path) -> Path | None:
    """The newest checkpoint under `root` that verifies. Changes nothing: a run may be saving there right now."""
    for directory in _numbered(root)[::-1]:
        try:
            verify(directory)
            return directory
        except CheckpointError as error:
            print(f"passing over a checkpoint: {error}", flush=True)
    return None


def prune(root: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and only once the newest verifies."""
    directories = _numbered(root)
    if len(directories) > keep:
        verify(directories[-1])
        for directory in directories[:-keep]:
            shutil.rmtree(directory)


def clear_debris(root: Path) -> None:
    """Remove what a killed save left behind; for the one process that saves under `root`."""
    for debris in root.glob("step_*.tmp"):
        shutil.rmtree(debris)


def _numbered(root: Path) -> list[Path]:
    return sorted(d for d in root.glob("step_*") if d.suffix != ".tmp")


def _flat(state: TrainState, carried: dict[str, Tensor]) -> dict[str, Tensor]:
    parts = {"model": state.weights | carried, "exp_avg": state.exp_avg, "exp_avg_sq": state.exp_avg_sq}
    return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _read(directory: Path, into: dict[str, Tensor]) -> None:
    try:
        dcp.load(into, storage_reader=FileSystemReader(directory / "state"), no_dist=True)
    except CheckpointException as error:  # a BaseException in torch, so it would slip through every except Exception
        raise CheckpointError(f"{directory} cannot be read: {error}") from error


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
