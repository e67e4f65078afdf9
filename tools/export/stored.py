"""The weights of a pipeline, one at a time: where each is read from, and how a component's files are written.

Memory holds one tensor (as it is stored, and as it will be), whatever the size of the model: a file's header is known
before its values are (`wemmu.checkpoint.stream`). How large a file may become only bounds what a reader has to download
or map at once.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import safe_open
from torch import Tensor, nn

from wemmu.checkpoint.adapters import add_merged, is_adapter, scale_of, to_merge
from wemmu.checkpoint.finite import narrowed
from wemmu.checkpoint.stored import StoredTensors
from wemmu.checkpoint.stream import NAMES, as_bytes, write_safetensors
from wemmu.published.layout import tensors

# Bytes of a file, as the published models have them.
LIMIT = 5_000_000_000
VLM_FILE, DIFFUSERS_FILE = "model.safetensors", "diffusion_pytorch_model.safetensors"


@dataclass(frozen=True)
class Stored:
    """A tensor that lies on a disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    def in_export(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in an export of `dtype`: only floating-point tensors are rounded."""
        return dtype if self.dtype.is_floating_point else self.dtype


def published(directory: Path, single: str) -> dict[str, Stored]:
    """Return the tensors of a directory in the published layout, under the names that they have there.

    Raises:
        BackboneError: if the directory is not whole.
        ValueError: for a tensor of a type that exports do not hold.
    """
    types = {word: dtype for dtype, word in NAMES.items()}
    stored = tensors(directory, single)
    if odd := [f"{name}: {each.dtype}" for name, each in stored.items() if each.dtype not in types]:
        raise ValueError(f"{directory} holds types that no export has ({odd[0]}); valid choices: {', '.join(types)}")
    return {n: Stored(each.shape, types[each.dtype], partial(_read, each.file, n)) for n, each in stored.items()}


def trained(checkpoint: StoredTensors, prefix: str) -> dict[str, Stored]:
    """Return the weights of a checkpoint whose names begin with `prefix`, under the rest of their names."""
    return {
        name.removeprefix(prefix): Stored(tuple(shape), torch.float32, partial(checkpoint.read, name))
        for name, shape in checkpoint.manifest.tensors.items()
        if name.startswith(prefix)
    }


def with_adapters(stored: Mapping[str, Stored], checkpoint: StoredTensors, prefix: str) -> dict[str, Stored]:
    """Replace tensors of `stored` by the checkpoint's weights (see `trained`), with adapters merged."""
    own = trained(checkpoint, prefix)
    found = {**stored, **{name: each for name, each in own.items() if not is_adapter(name)}}
    for name, (a, b) in to_merge(own, ()).items():
        scale = scale_of(prefix + name, checkpoint.manifest.adapters)
        assert scale is not None, "the manifest has that of all adapters inside"
        found[name] = replace(
            found[name], dtype=torch.float32, read=partial(_merged, found[name], own[a], own[b], scale)
        )
    return found


def _merged(base: Stored, a: Stored, b: Stored, scale: float) -> Tensor:
    merged = base.read().float()
    add_merged(merged, a.read(), b.read(), scale)
    return merged


def check_names(component: nn.Module, stored: Mapping[str, Stored], what: str) -> None:
    """Raise ValueError unless the tensors are those of the component, by name and shape."""
    needed = {name: tuple(tensor.shape) for name, tensor in component.state_dict().items()}
    if odd := sorted(needed.items() ^ {name: each.shape for name, each in stored.items()}.items()):
        raise ValueError(
            f"the {what} does not have exactly the tensors of its config; the first difference: {odd[0][0]}"
        )


def write_component(directory: Path, single: str, stored: Mapping[str, Stored], dtype: torch.dtype) -> None:
    """Write tensors into `directory` as `single`, or as several files with an index if that would exceed `LIMIT`."""
    directory.mkdir(parents=True, exist_ok=True)
    types = {name: each.in_export(dtype) for name, each in stored.items()}
    empty = {name: torch.empty(each.shape, dtype=types[name], device="meta") for name, each in stored.items()}
    pattern = "{suffix}.".join(single.split("."))
    split = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=LIMIT)
    for file, names in split.filename_to_tensors.items():
        announced = {name: (types[name], stored[name].shape) for name in names}
        write_safetensors(directory / file, announced, lambda name: narrowed(name, stored[name].read(), types[name]))
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": dict(sorted(split.tensor_to_filename.items()))}
        (directory / f"{single}.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def sha256_of_tensor(tensor: Tensor) -> str:
    """Hash the values as they are in memory, without shape and dtype."""
    return hashlib.sha256(as_bytes(tensor.contiguous())).hexdigest()


def _read(file: Path, name: str) -> Tensor:
    # Opened for each, since what an open file has shown of itself stays in memory.
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)
