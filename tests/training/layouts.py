"""A small training state, and how ranks of every layout hold it. Free of pytest: ranks import it when they start."""

from collections.abc import Callable
from math import ceil
from pathlib import Path

import torch
from torch import Tensor

from tests.checkpoints import load_state
from wemmu.checkpoint import retention
from wemmu.checkpoint.manifest import Manifest, Origin, read_manifest
from wemmu.checkpoint.sharded_tensor import ShardedTensor, flat_parts, row_parts
from wemmu.checkpoint.state import TrainState

SHAPES = {
    "bridge.table": (3, 3, 4),
    "bridge.scale": (),
    "dit.qk.weight": (6, 5),
    "dit.conv_inverted.weight": (8, 3, 1, 1),
    "dit.to_out.weight": (5, 6),
    "dit.to_out.bias": (7,),
}
CARRIED = {"bridge.pathway.weight": torch.arange(6.0).reshape(2, 3)}
# How a tensor is cut by tensor parallelism: along this dimension, in this number of pieces each of which is shared.
SLICED = {"dit.qk.weight": (0, 1), "dit.conv_inverted.weight": (0, 2), "dit.to_out.weight": (1, 1)}
PADDING = 2
PARTS = ("weights", "exp_avg", "exp_avg_sq", "ema")

# What a rank of a world holds of a tensor, given the whole of it.
Layout = Callable[[str, Tensor, int, int], Tensor | None]


def origin(layout: str = "single") -> Origin:
    return Origin("stage1", 7, 32, {"vlm": "a" * 64}, {"engine": layout})


def canonical(step: int) -> TrainState:
    """The whole state after `step` steps; every element of every tensor has a value of its own."""
    g = torch.Generator().manual_seed(step)
    parts = {part: {n: torch.randn(shape, generator=g) for n, shape in SHAPES.items()} for part in PARTS}
    return TrainState(**parts, steps=step)


def held(state: TrainState, layout: Layout, rank: int, world: int) -> TrainState:
    """What a rank holds of a whole state, in memory of its own."""

    def of(whole: dict[str, Tensor]) -> dict[str, Tensor]:
        mine = {name: layout(name, tensor, rank, world) for name, tensor in whole.items()}
        return {name: tensor for name, tensor in mine.items() if tensor is not None}

    return TrainState(**{part: of(getattr(state, part)) for part in PARTS}, steps=state.steps)


def blank(state: TrainState) -> TrainState:
    """The same memory, overwritten."""
    for part in PARTS:
        for tensor in getattr(state, part).values():
            for _, view in ShardedTensor.of(tensor).parts:
                view.fill_(float("nan"))
    return state


def differences(state: TrainState, whole: TrainState) -> list[str]:
    """The names of tensors of which this rank holds something that is not as in the whole state, bit for bit."""

    def wrong(tensor: Tensor, right: Tensor) -> bool:
        return any(not torch.equal(view, right[place]) for place, view in ShardedTensor.of(tensor).places)

    return [
        f"{part}.{name}"
        for part in PARTS
        for name, tensor in getattr(state, part).items()
        if wrong(tensor, getattr(whole, part)[name])
    ]


def single(name: str, whole: Tensor, rank: int, world: int) -> Tensor:
    """As plain data parallelism: all of it on every rank."""
    return whole.clone()


def zero3(name: str, whole: Tensor, rank: int, world: int) -> ShardedTensor:
    """As DeepSpeed: equal shares of the flattened tensor, with padding behind the last."""
    share = ceil(whole.numel() / world)
    flat = torch.cat([whole.flatten(), torch.full((share,), -1.0)])[rank * share : (rank + 1) * share].clone()
    return ShardedTensor(whole.shape, flat_parts(whole.shape, rank * share, flat))


def fsdp(name: str, whole: Tensor, rank: int, world: int) -> ShardedTensor:
    """As FSDP2: rows, fewer or none on the last ranks. What has no rows is on all."""
    if not whole.ndim:
        return ShardedTensor.of(whole.clone())
    first, rows = _rows(whole, rank, world)
    return ShardedTensor(whole.shape, row_parts(whole.shape, rows, first))


def tensor(name: str, whole: Tensor, rank: int, world: int) -> ShardedTensor:
    """As tensor parallelism over two ranks, if there are as many, and FSDP2 over the copies of that."""
    ways = min(world, 2)
    if name not in SLICED:
        return fsdp(name, whole, rank // ways, world // ways)
    dim, pieces = SLICED[name]
    length = whole.shape[dim] // pieces
    share = ceil(length / ways)
    begin, end = rank % ways * share, min((rank % ways + 1) * share, length)
    ranges = [(piece * length + begin, piece * length + end, piece * (end - begin)) for piece in range(pieces)]
    # A 1x1 convolution is held as the matrix that it is.
    matrix = whole.flatten(1)
    taken = [matrix.narrow(dim, b, e - b) for b, e, _ in ranges]
    local = torch.cat([*taken, torch.full_like(matrix.narrow(dim, 0, PADDING), -1)], dim)
    first, rows = _rows(local, rank // ways, world // ways)
    return ShardedTensor(whole.shape, row_parts(whole.shape, rows, first, dim, ranges))


def pipeline(name: str, whole: Tensor, rank: int, world: int) -> Tensor | None:
    """As pipeline stages: whole tensors, each on one of the ranks; one is on the first and on the last."""
    stages = {list(SHAPES).index(name) % world} | ({0, world - 1} if name == "bridge.table" else set())
    return whole.clone() if rank in stages else None


LAYOUTS: dict[str, Layout] = {f.__name__: f for f in (single, zero3, fsdp, tensor, pipeline)}


def _rows(local: Tensor, rank: int, world: int) -> tuple[int, Tensor]:
    """This rank's rows, in memory of their own, and the number of the first."""
    share = ceil(len(local) / world)
    first = min(rank * share, len(local))
    return first, local[first : first + share].clone()


def newest_state(folder: Path) -> tuple[Manifest, TrainState]:
    """The newest checkpoint of the stage in `folder`, whole."""
    newest = retention.latest(folder / "checkpoints")
    assert newest is not None
    manifest = read_manifest(newest)
    parts = PARTS if manifest.ema else PARTS[:3]
    empty = {part: {name: torch.empty(manifest.tensors[name]) for name in manifest.trained} for part in parts}
    state = TrainState(**empty, steps=manifest.step)
    load_state(newest, state)
    return manifest, state
