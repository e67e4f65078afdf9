"""Tensors that are divided among ranks, in the terms of torch's distributed checkpoint (DCP).

Every layout shows its state under canonical names and whole shapes, as `ShardedTensor`: rectangles with their offsets,
each a view of the live memory. What one layout saves any other loads, since DCP maps rectangles onto rectangles.

    flat_parts   a range of the flattened tensor, which is what DeepSpeed ZeRO-3 gives a rank
    row_parts    rows of a tensor, or of its slice under tensor parallelism, which is what FSDP2 gives a rank

`WholePlanner` refuses to save what does not add up to whole tensors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

# Where a part begins in the whole tensor, and the part.
TensorShard = tuple[tuple[int, ...], Tensor]
# (begin in the whole, end in the whole, begin in the local tensor)
TensorRange = tuple[int, int, int]


@dataclass(frozen=True)
class TensorSlice:
    """The place of this rank's parameter in the whole one.

    name: of the whole one, as in the DiT before the split. shape: of the whole one, with as many dimensions as the
    local tensor. dim: the dimension that is split; None: whole and equal on all tensor ranks. ranges: the elements
    along `dim` that this rank has; two in a gated feed-forward (values, gates), none if all its heads only pad. What is
    in no range is padding, always 0.
    """

    name: str
    shape: tuple[int, ...]
    dim: int | None = None
    ranges: tuple[TensorRange, ...] = ()


class ShardedTensor(Tensor):
    """A whole tensor of `shape`; this rank holds `parts` of it, perhaps none.

    It has a shape and a type and no data of its own: DCP writes the parts and fills them in place, and no operator
    works on it. Parts without elements are left out.

    Raises:
        ValueError: if a part does not lie within the shape.
    """

    parts: list[TensorShard]

    @staticmethod
    def __new__(cls, shape: Sequence[int], parts: Sequence[TensorShard]) -> "ShardedTensor":
        held = [(tuple(offset), part.detach()) for offset, part in parts if part.numel()]
        for offset, part in held:
            ends = [begin + size for begin, size in zip(offset, part.shape, strict=True)]
            if len(offset) != len(shape) or any(e > s for e, s in zip(ends, shape, strict=True)) or min((0, *offset)):
                raise ValueError(f"a part of {list(part.shape)} at {list(offset)} is not within {list(shape)}")
        first = held[0][1] if held else torch.empty(0)
        placed = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=first.dtype, device=first.device)
        placed.parts = held
        return placed

    @classmethod
    def of(cls, tensor: Tensor) -> "ShardedTensor":
        """Wrap a tensor that is whole on this rank as one part; return a `ShardedTensor` unchanged."""
        return tensor if isinstance(tensor, cls) else cls(tensor.shape, [((0,) * tensor.ndim, tensor)])

    @property
    def places(self) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """Yield each part behind the index of the whole tensor at which it lies."""
        for offset, part in self.parts:
            yield tuple(slice(o, o + n) for o, n in zip(offset, part.shape, strict=True)), part

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func} of a placed tensor; only its parts have data")

    def __repr__(self) -> str:  # type: ignore[override]
        parts = ", ".join(f"{list(part.shape)} at {list(offset)}" for offset, part in self.parts)
        return f"ShardedTensor({list(self.shape)}: {parts or 'nothing'})"

    # What DCP calls. The names are its own.

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=chunk, properties=TensorProperties(dtype=self.dtype), size=self.size()
                ),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offset), part.size()) for offset, part in self.parts]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        (found,) = (part for offset, part in self.parts if offset == tuple(index.offset))
        return found


def flat_parts(shape: Sequence[int], begin: int, flat: Tensor) -> list[TensorShard]:
    """Return views of `flat`, the elements from `begin` on of the flattened tensor of `shape`.

    Returns at most 2 * len(shape) - 1 views of `flat`. What lies behind the end of the tensor is padding, of no part.
    """
    assert flat.ndim == 1
    end = min(begin + len(flat), prod(shape))
    return [
        (offset, flat[first - begin : first - begin + prod(sizes)].view(sizes))
        for offset, sizes, first in _rectangles(tuple(shape), begin, end)
    ]


def _rectangles(shape: tuple[int, ...], begin: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    """The elements [begin, end) of a flattened tensor as (offset, sizes, first element) in their order."""
    if begin >= end:
        return
    if not shape:
        yield (), (), 0
        return
    row = prod(shape[1:])
    # The first and the last row may be held in part; all between them are one rectangle.
    first, last = -(-begin // row), end // row
    if first > last:
        yield from _in_row(shape, last, begin, end)
        return
    yield from _in_row(shape, first - 1, begin, first * row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:]), first * row
    yield from _in_row(shape, last, last * row, end)


def _in_row(
    shape: tuple[int, ...], index: int, begin: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int]]:
    start = index * prod(shape[1:])
    for offset, sizes, first in _rectangles(shape[1:], begin - start, end - start):
        yield (index, *offset), (1, *sizes), start + first


def row_parts(
    shape: Sequence[int],
    rows: Tensor,
    first_row: int = 0,
    dim: int | None = None,
    ranges: Sequence[tuple[int, int, int]] = (),
) -> list[TensorShard]:
    """Return `rows` of a local tensor as parts of the whole tensor of `shape`, of which the local one may be a slice.

    rows: rows [first_row, first_row + len(rows)) of the local tensor; trailing dimensions of size 1 may be missing (a
    1x1 convolution kept as a matrix).
    dim, ranges: the local tensor holds the elements [begin, end) of `dim` of the whole from element `at` on, for each
    (begin, end, at) of `ranges`; what lies in no range is padding. With None it is the whole tensor.
    """
    rows = rows[(..., *(None,) * (len(shape) - rows.ndim))]
    if dim is None:
        dim, ranges = 0, [(0, shape[0], 0)]
    # Where the rows that are held begin and end along the sliced dimension of the local tensor.
    low = first_row if dim == 0 else 0
    high = low + rows.shape[dim]
    parts = []
    for begin, end, at in ranges:
        first, last = max(at, low), min(at + end - begin, high)
        if first < last:
            offset = [first_row, *(0,) * (len(shape) - 1)]
            offset[dim] = begin + first - at
            parts.append((tuple(offset), rows.narrow(dim, first - low, last - first)))
    return parts


class WholePlanner(DefaultSavePlanner):
    """Saves whole tensors in float32: each element once, whichever rank holds it.

    The same rectangle on several ranks is a replica, which DCP writes once.
    """

    def create_local_plan(self) -> SavePlan:
        plan = super().create_local_plan()
        for item in plan.items:
            assert item.tensor_data is not None, "a checkpoint has tensors only"
            item.tensor_data.properties.dtype = torch.float32
        return plan

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Raise ValueError naming the tensors that are not whole."""
        # Refuses overlaps, and holes in what several ranks hold.
        plan, metadata = super().create_global_plan(all_plans)
        flaws = []
        # All tensors that a rank knows, also those without a part on this rank.
        for name in sorted({name for one in all_plans for name in one.planner_data}):
            stored = metadata.state_dict_metadata.get(name)
            if stored is None:
                flaws.append(f"{name}: no rank holds any of it")
                continue
            assert isinstance(stored, TensorStorageMetadata), "a checkpoint has tensors only"
            if missing := prod(stored.size) - sum(prod(chunk.sizes) for chunk in stored.chunks):
                flaws.append(f"{name}: {missing} of its {prod(stored.size)} elements are held by no rank")
        if flaws:
            more = f"; and {len(flaws) - 3} more" if len(flaws) > 3 else ""
            raise ValueError(f"the ranks do not hold whole tensors: {'; '.join(flaws[:3])}{more}")
        return plan, metadata

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        data = super().resolve_data(write_item)
        assert isinstance(data, Tensor), "a checkpoint has tensors only"
        return data.float()
