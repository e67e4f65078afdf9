"""The manifest of a checkpoint: its content and the SHA-256 of every file, because DCP has no checksums."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from wemmu.checkpoint.collective import ALONE, CheckpointError, Ranks
from wemmu.checkpoint.exported import read_export
from wemmu.config.exported import is_export
from wemmu.config.files import naming
from wemmu.config.neighbours import instead

FORMAT = 1
FILE = "manifest.json"


@dataclass(frozen=True)
class Origin:
    """Where checkpoints come from; the same for all of a run. The first checkpoints of this format lack the defaults.

    seed: with the step, the key of all randomness. frozen: backbone -> SHA-256 of the weights it was trained beside.
    layout: engine and degrees of parallelism, for people; any other layout can load them. settings: what the config
    says of the training, field -> value (`wemmu.training.resume`). first_step, first_samples: where this attempt began.
    adapters: how the names of layers with adapters inside begin -> their alpha / rank. copied: how the names of weights
    begin that are not inside because they are copies of a frozen backbone's -> the backbone.
    """

    stage: str
    seed: int
    resolution: int
    frozen: dict[str, str]
    layout: dict[str, str | int] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    first_step: int = 0
    first_samples: int = 0
    adapters: dict[str, float] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Manifest(Origin):
    """step: optimizer steps taken, which is also the data position.

    tensors: name -> shape of every weight inside. trained: those of them that have moments. ema: whether these have a
    moving average, too. files: path within the checkpoint -> SHA-256.
    """

    format: int
    step: int
    tensors: dict[str, list[int]]
    trained: list[str]
    files: dict[str, str]
    libraries: dict[str, str]
    ema: bool = False


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Write it with its own SHA-256 and sync it."""
    data = asdict(manifest)
    with naming(directory / FILE), (directory / FILE).open("w", encoding="utf-8") as file:
        json.dump(data | {"sha256": _digest(data)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(directory: Path) -> Manifest:
    """Read and check the manifest only; an exported pipeline gets one from its parity.json.

    Raises:
        CheckpointError: if it is missing, damaged or of another format.
    """
    if is_export(directory):
        return Manifest(format=FORMAT, **read_export(directory))
    try:
        data = json.loads((directory / FILE).read_text(encoding="utf-8"))
        # Absent in the first checkpoints of this format.
        sha256 = data.pop("sha256", None)
        manifest = Manifest(**data)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        found = f"{directory} is not a checkpoint: its {FILE} cannot be read ({error})"
        raise CheckpointError(f"{found}{instead(directory, 'weights')}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{directory} has checkpoint format {manifest.format}; this version reads {FORMAT}")
    if sha256 not in (None, _digest(data)):
        raise CheckpointError(f"{directory}: its {FILE} is damaged (its SHA-256 differs); use another checkpoint")
    return manifest


def verify(directory: Path, ranks: Ranks = ALONE) -> Manifest:
    """Compare every file with its hash; `ranks` share the files and get the same result.

    Raises:
        CheckpointError: names a file that is missing or differs.
    """

    def compare_mine() -> None:
        files = read_manifest(directory).files
        for name in sorted(files)[ranks.rank :: ranks.world]:
            _compare(directory, name, files[name])

    ranks.together(f"{directory} cannot be used", compare_mine, lambda _: None)
    return read_manifest(directory)


def _compare(directory: Path, name: str, expected: str) -> None:
    if not (directory / name).is_file():
        raise CheckpointError(f"{directory}: the file {name} is missing; use another checkpoint")
    if sha256_of(directory / name) != expected:
        raise CheckpointError(f"{directory}: the file {name} is damaged (its SHA-256 differs); use another checkpoint")


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def some(names: list[str]) -> str:
    """Return names for an error message, at most three."""
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else "nothing"


def _digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()
