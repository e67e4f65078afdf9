"""Lists the content of foreign `torch.save` files without running their code and without reading values.

A pickle can name any function to be called. These are read by torch's `weights_only` unpickler, which knows tensors and
plain containers, and the few classes of DeepSpeed that its files hold, for which inert ones stand in. Anything else is
refused by name before the file is unpickled.
"""

import pickle
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tools.foreign.folder import FolderError


class Inert:
    """Stands for an object of DeepSpeed: holds its arguments and its attributes and does nothing with them."""

    def __init__(self, *arguments: Any):
        self.arguments = arguments


# Values read at once.
CHUNK = 1_000_000
STAND_INS = (
    # How Python 3.11.0 to 3.11.3 names the member of an enumeration.
    "builtins.getattr",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)


@dataclass(frozen=True)
class Values:
    """Contiguous numbers in a file: `count` of type `dtype` from byte `offset` on."""

    file: Path
    offset: int
    dtype: torch.dtype
    count: int

    @classmethod
    def of(cls, file: Path, tensor: Any) -> "Values":
        """Return where the values of a tensor from `load(file)` are; raise FolderError for any other tensor."""
        if not isinstance(tensor, Tensor) or not tensor.is_contiguous():
            raise FolderError(f"{file} holds {type(tensor).__name__} where a tensor was expected")
        storage: Any = tensor.untyped_storage()
        begin = int(storage._checkpoint_offset + tensor.storage_offset() * tensor.itemsize)
        return cls(file, begin, tensor.dtype, tensor.numel())

    def part(self, begin: int, count: int) -> "Values":
        """Return `count` of them from number `begin` on; raise FolderError if there are fewer."""
        if not 0 <= begin <= begin + count <= self.count:
            raise FolderError(f"{self.file} holds {self.count} values, but {begin} to {begin + count} are needed")
        return replace(self, offset=self.offset + begin * self.dtype.itemsize, count=count)

    def read_into(self, target: Tensor) -> None:
        """Read them, chunk by chunk, into a flat tensor of as many elements; a type of fewer digits is held exactly."""
        width = self.dtype.itemsize
        buffer = bytearray(min(CHUNK, self.count) * width)
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            for begin in range(0, self.count, CHUNK):
                size = min(CHUNK, self.count - begin)
                if stream.readinto(memoryview(buffer)[: size * width]) < size * width:
                    raise FolderError(f"{self.file} ends before its values do; it is damaged")
                target[begin : begin + size] = torch.frombuffer(buffer, dtype=self.dtype, count=size)


def load(file: Path) -> Any:
    """Return the content of a file of `torch.save`; its tensors have no values (`Values.of` says where they are).

    Raises:
        FolderError: if it is missing, damaged (torch's own CRCs are compared), or names what is not known to be inert.
    """
    if not file.is_file():
        raise FolderError(f"{file} is missing; the folder must hold the files of all ranks")
    try:
        with zipfile.ZipFile(file) as archive:
            broken = archive.testzip()
            packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise FolderError(f"{file} is damaged or no file of torch.save: {error}") from error
    if broken or packed:
        raise FolderError(f"{file} is damaged: its record {broken or packed[0]} is not what was written")
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in STAND_INS]):
            if foreign := sorted(torch.serialization.get_unsafe_globals_in_checkpoint(file)):
                raise FolderError(
                    f"{file} names {', '.join(foreign)}, which could run anything, so nothing of it was read; known "
                    f"are tensors, plain containers and {', '.join(name.rpartition('.')[2] for name in STAND_INS)}"
                )
            return torch.load(file, map_location="meta", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise FolderError(f"{file} cannot be read as tensors and plain containers: {error}") from error
