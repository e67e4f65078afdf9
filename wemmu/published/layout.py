"""The weight files of a directory in the published layout, and the tensors in them."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from wemmu.config import ConfigError

# Names of a single weight file in transformers and diffusers; several files have an index.
TRANSFORMERS, DIFFUSERS = "model.safetensors", "diffusion_pytorch_model.safetensors"
# Begin of a Git LFS pointer, which git leaves in place of a large file.
_POINTER = b"version https://git-lfs"
# safetensors rejects larger headers, in bytes.
_LONGEST_HEADER = 100_000_000


class BackboneError(ConfigError):
    """A backbone that cannot be loaded; the message names the file, the problem and the remedy."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's bytes: `file` from `begin` to `end`. dtype: safetensors' name."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_json(file: Path) -> dict[str, Any]:
    """Raise BackboneError if the file is missing or holds no JSON object."""
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BackboneError(f"{file} is needed but cannot be read: {error.strerror or error}") from error
    refuse_pointer(file, data)
    try:
        # As the libraries read it: json.loads alone would take UTF-16, too.
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise BackboneError(f"{file} is not JSON: {error}; download it again") from error
    if not isinstance(found, dict):
        raise BackboneError(f"{file} holds no JSON object; download it again")
    return found


def refuse_pointer(file: Path, begin: bytes) -> None:
    """Raise BackboneError if the file is a Git LFS pointer."""
    if begin.startswith(_POINTER):
        raise BackboneError(f"{file} is a Git LFS pointer, not the file; `git lfs pull` downloads it")


def single_file(directory: Path) -> str:
    """Return the name of a single weight file in a directory: diffusers writes its class into the config."""
    return DIFFUSERS if "_class_name" in read_json(directory / "config.json") else TRANSFORMERS


def weight_files(directory: Path, single: str) -> list[Path]:
    """Return the weight files that the loading library chooses; `single` is the name of a single file.

    Raises:
        BackboneError: names what is missing.
    """
    index, one = directory / f"{single}.index.json", directory / single
    # If both exist, diffusers uses the index and transformers the single file.
    if one.is_file() and not (single == DIFFUSERS and index.is_file()):
        return [one]
    if not index.is_file():
        raise BackboneError(f"{directory} holds neither {single} nor {index.name}{_instead(directory, single)}")
    mapped = read_json(index).get("weight_map")
    if not isinstance(mapped, dict) or not mapped or not all(isinstance(name, str) for name in mapped.values()):
        raise BackboneError(f"{index} has no weight_map; download it again")
    files = [directory / name for name in sorted(set(mapped.values()))]
    if absent := [file.name for file in files if not file.is_file()]:
        raise BackboneError(f"{directory} lacks {', '.join(absent)}, which {index.name} lists: an incomplete download")
    return files


def _instead(directory: Path, single: str) -> str:
    """Describe the directory's other weights, which would not be loaded."""
    stem = single.removesuffix(".safetensors")
    there = sorted(file.name for file in directory.iterdir() if file.is_file()) if directory.is_dir() else []
    if variants := [name for name in there if name.startswith(f"{stem}.") and "safetensors" in name]:
        return (
            f", only a variant, {', '.join(variants[:3])}; download the weights without a variant, or rename all files "
            "of this one (and in its index) to names without it"
        )
    if pickles := [name for name in there if name.endswith((".bin", ".pt", ".pth", ".ckpt"))]:
        return f", only {', '.join(pickles[:3])}, which can run code when it is read; download the safetensors"
    return f"; it holds {', '.join(there[:5]) or 'nothing'}"


def tensors(directory: Path, single: str) -> dict[str, StoredTensor]:
    """Return name -> location of all tensors in the weight files.

    Raises:
        BackboneError: names a file that is missing, broken or not the one in the index.
    """
    found: dict[str, StoredTensor] = {}
    files = weight_files(directory, single)
    for file in files:
        held = header(file)
        if twice := sorted(found.keys() & held.keys()):
            raise BackboneError(f"{file} holds {twice[0]}, and so does {found[twice[0]].file.name}")
        found |= held
    if files != [directory / single]:
        mapped = read_json(directory / f"{single}.index.json")["weight_map"]
        if odd := sorted(name for name, file in mapped.items() if name not in found or found[name].file.name != file):
            raise BackboneError(f"{directory / mapped[odd[0]]} does not hold {odd[0]}, which {single}.index.json lists")
        if extra := sorted(found.keys() - mapped.keys()):
            raise BackboneError(
                f"{directory / single}.index.json does not list {extra[0]}, which {found[extra[0]].file.name} holds; "
                "download it again"
            )
    return found


def header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, by offset; read once, unless the file changes. Do not change it.

    Raises:
        BackboneError: if it is not a safetensors file, or its size differs from its header.
    """
    state = file.stat()
    return _header(file, state.st_size, state.st_mtime_ns)


# Several checks of one start read the same headers, which are tens of kB of JSON.
@cache
def _header(file: Path, size: int, _: int) -> dict[str, StoredTensor]:
    with file.open("rb") as stream:
        begin = stream.read(len(_POINTER))
        refuse_pointer(file, begin)
        length = int.from_bytes(begin[:8], "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise BackboneError(f"{file} is not a safetensors file, or is truncated ({size} bytes); download it again")
        stream.seek(8)
        text = stream.read(length)
    try:
        entries = {name: entry for name, entry in json.loads(text).items() if name != "__metadata__"}
        found = {
            name: StoredTensor(file, e["dtype"], tuple(e["shape"]), *(8 + length + at for at in e["data_offsets"]))
            for name, e in sorted(entries.items(), key=lambda item: item[1]["data_offsets"])
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BackboneError(f"{file} is not a safetensors file: its header is unreadable; download it again") from error
    if (end := max((t.end for t in found.values()), default=8 + length)) != size:
        raise BackboneError(f"{file} has {size} bytes, but its header says {end}: an incomplete download")
    try:
        # The library knows the types, and checks that they, shapes and offsets fit.
        with safe_open(file, "np"):
            pass
    except SafetensorError as error:
        # Its words name one tensor, another one each time.
        raise BackboneError(
            f"{file} is not a safetensors file: the header's types, shapes and offsets do not fit; download it again"
        ) from error
    return found
