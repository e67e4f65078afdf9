"""Writes safetensors one tensor at a time, with one tensor in memory.

The format starts with a header of all names, types, shapes and offsets (https://github.com/huggingface/safetensors,
"Format"). All of it is known before any value, so the values can follow one after the other. The format's own writer
takes all tensors of a file at once.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from wemmu.config.files import naming

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}
ALIGNMENT = 8


def write_safetensors(
    file: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], read: Callable[[str], Tensor]
) -> None:
    """Write `tensors`, name -> (type, shape), to `file` and wait until they are on the disk.

    read: gives the tensor of a name; it is called once for each, and what it gives is let go before the next.

    Raises:
        ValueError: naming the tensor, if its type has no name here or `read` gives another type or shape.
    """
    # Wider types first, as the format's own writer does, so that each begins at a multiple of its width.
    order = sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name))
    with naming(file), file.open("wb") as stream:
        stream.write(_header(order, tensors))
        for name in order:
            tensor = read(name).contiguous()
            if (tensor.dtype, list(tensor.shape)) != (tensors[name][0], list(tensors[name][1])):
                raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, announced was {tensors[name]}")
            stream.write(as_bytes(tensor))
            del tensor
        stream.flush()
        os.fsync(stream.fileno())


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    # Not memoryview(...): to a type checker an array is a buffer only from Python 3.12 on.
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().data


def _header(order: Iterable[str], tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        dtype, shape = tensors[name]
        if dtype not in NAMES:
            raise ValueError(f"{name} has type {dtype}; valid choices: {', '.join(map(str, NAMES))}")
        begin, end = end, end + prod(shape) * dtype.itemsize
        entries[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
