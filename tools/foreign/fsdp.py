"""The parameters, by name, in a folder of `torch.distributed.checkpoint.save`, which sharded engines such as FSDP use.

Moments are read where `get_optimizer_state_dict` and Accelerate put them: below `state.NAME`. What is no tensor, such
as learning rates, is a pickle there and never read.
"""

import re
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from tools.export.stored import Stored
from tools.foreign.folder import Folder, FolderError, Parameter
from wemmu.checkpoint.collective import ALONE
from wemmu.checkpoint.metadata import CheckedReader
from wemmu.checkpoint.store import MOMENTS, WEIGHTS, read

OF_ADAM = re.compile(rf"(?:.*?\.)?state\.(.+)\.({'|'.join(MOMENTS)}|step)")


def indices(path: Path) -> list[Path]:
    """Return the indices of DCP in it or, as Accelerate saves model and optimizer, in folders inside."""
    return sorted([*path.glob(".metadata"), *path.glob("*/.metadata")])


def read_folder(path: Path) -> Folder:
    """Read what a folder holds, and where; values are read later, one parameter at a time.

    Raises:
        FolderError: naming the file that is damaged or not known to be inert, or what is not supported.
    """
    held: dict[str, Stored] = {}
    for index in indices(path):
        found = _tensors(index)
        if held.keys() & found.keys():
            raise FolderError(f"{path} holds several checkpoints; name one, for example {index.parent}")
        held |= found
    moments: dict[str, dict[str, Stored]] = defaultdict(dict)
    for key in list(held):
        if match := OF_ADAM.fullmatch(key):
            moments[match[1]][match[2]] = held.pop(key)
    steps = {int(parts.pop("step").read()) for parts in moments.values() if "step" in parts}
    if len(steps) != bool(moments):
        raise FolderError(f"{path}: its parameters took different numbers of steps or none, {sorted(steps)}")
    # How names of weights begin, before what the optimizer calls them; an average beside the model may fit, too.
    first = next(iter(moments), "")
    starts = {key.removesuffix(first) for key in held if key.endswith(first)}
    fitting = [start for start in starts if held.keys() >= {start + name for name in moments}]
    if moments and not fitting:
        raise FolderError(f"{path}: no weights are called as in the optimizer's state, such as {first}")
    start = min(fitting, key=lambda start: (not start.endswith("model."), start), default="")
    adam = {start + name: parts for name, parts in moments.items()}
    parameters = {key: Parameter(key in adam, {WEIGHTS: each, **adam.get(key, {})}) for key, each in held.items()}
    return Folder("torch.distributed.checkpoint", max(steps, default=0), parameters)


def _tensors(index: Path) -> dict[str, Stored]:
    reader = CheckedReader(index.parent)
    try:
        found = reader.read_metadata().state_dict_metadata
    except Exception as error:  # whatever a damaged pickle makes of itself
        raise FolderError(f"{index} cannot be read as an index of tensors: {error}") from error
    return {
        key: Stored(tuple(each.size), each.properties.dtype, partial(_read, reader, index.parent, key, each.size))
        for key, each in found.items()
        if isinstance(each, TensorStorageMetadata) and each.properties.dtype.is_floating_point
    }


def _read(reader: CheckedReader, directory: Path, key: str, shape: torch.Size) -> Tensor:
    # What no file holds stays NaN, which no checkpoint takes.
    whole = torch.full(shape, torch.nan)
    read(directory, {key: whole}, ALONE, reader)
    return whole
