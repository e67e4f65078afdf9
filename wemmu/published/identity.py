"""The identity of a directory's weights: a hash of its tensors, however they are split into files.

Checkpoints, stored latents and exports record it, and refuse other weights.
"""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

from wemmu.published.layout import BackboneError, StoredTensor, single_file, tensors, weight_files

# Prefix of an identity. Earlier versions recorded the bare SHA-256 of files.
PREFIX = "tensors:"
_CHUNK = 2**22
# safetensors' name of a type -> its width, and the exponent, whose bits are all 1 in infinities and NaN.
_EXPONENTS = {
    "F64": ("<u8", 0x7FF << 52),
    "F32": ("<u4", 0xFF << 23),
    "F16": ("<u2", 0x1F << 10),
    "BF16": ("<u2", 0xFF << 7),
}


class Identity(str):
    """Computes the identity: `tensors:` and a SHA-256 over names, types, shapes and bytes."""

    directory: Path

    def __new__(cls, name: str, directory: Path) -> "Identity":
        found = super().__new__(cls, name)
        found.directory = directory
        return found

    def __reduce__(self) -> tuple[type, tuple[str, Path]]:
        return Identity, (str(self), self.directory)


def identity(directory: Path) -> Identity:
    """Return the identity of the weights that are loaded from a directory in the published layout.

    Reads all of them, at the speed of the disk or of SHA-256 on all cores. Cached within the process only: a cache on
    disk could become outdated.

    Raises:
        BackboneError: if the weights are not whole, or a tensor holds NaN or infinities, but for a stored attention
            mask.
    """
    files = weight_files(directory, single_file(directory))
    return _identity(directory, tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files))


@cache
def _identity(directory: Path, _: tuple[tuple[Path, int, int], ...]) -> Identity:
    held = sorted(tensors(directory, single_file(directory)).items())
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(_digest, *zip(*held, strict=True)) if held else ()
        lines = [[name, t.dtype, list(t.shape), digest] for (name, t), digest in zip(held, digests, strict=True)]
    return Identity(PREFIX + hashlib.sha256(json.dumps(lines).encode()).hexdigest(), directory)


def _digest(name: str, tensor: StoredTensor) -> str:
    digest, left = hashlib.sha256(), tensor.end - tensor.begin
    # Looked for here because this reads every byte anyway.
    width, exponent = ("<u1", 0) if name.endswith("mask") else _EXPONENTS.get(tensor.dtype, ("<u1", 0))
    with tensor.file.open("rb") as stream:
        stream.seek(tensor.begin)
        while left:
            chunk = stream.read(min(_CHUNK, left))
            if not chunk:
                raise BackboneError(f"{tensor.file} has become shorter while it was read")
            digest.update(chunk)
            left -= len(chunk)
            if exponent and (np.frombuffer(chunk, width) & exponent == exponent).any():
                raise BackboneError(
                    f"{tensor.file}: {name} holds NaN or infinity, with which nothing can be computed; download the "
                    "file again, or take weights from before they diverged"
                )
    return digest.hexdigest()


def is_same(recorded: str, here: str) -> bool:
    """Return whether the recorded identity equals `here`, also in the form of earlier versions.

    Those hashed every safetensors file of the directory, loaded or not. So the weights are the same if the hash of all
    files, or of the loaded ones, is equal.
    """
    if recorded == here or recorded.startswith(PREFIX) or not isinstance(here, Identity):
        return recorded == here
    in_use = weight_files(here.directory, single_file(here.directory))
    return recorded in (hash_files(here.directory), _hash(in_use))


def short(name: str) -> str:
    """Shorten an identity for messages."""
    return name.removeprefix(PREFIX)[:12]


def hash_files(directory: Path) -> str:
    """Return the identity of earlier versions: SHA-256 over names and content of a directory's safetensors files."""
    return _hash(sorted(directory.glob("*.safetensors")))


def _hash(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode())
        digest.update(_file_digest(file, file.stat().st_size, file.stat().st_mtime_ns))
    return digest.hexdigest()


@cache
def _file_digest(file: Path, *_: int) -> bytes:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").digest()
