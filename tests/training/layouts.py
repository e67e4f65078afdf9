"""A small training state, and how ranks hold it. Free of pytest: ranks import it when they start."""

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
PARTS = ("weights", "exp_avg", "exp_avg_sq", "ema")

# The whole of a tensor -> what a rank of a world holds of it.
Layout = Callable[[Tensor, int, int], Tensor]


def origin(layout: str = "single") -> Origin:
    return Origin("stage1", 7, 32, {"vlm": "a" * 64}, {"engine": layout})


def canonical(step: int) -> TrainState:
    """The whole state after `step` steps; every element of every tensor has a value of its own."""
    g = torch.Generator().manual_seed(step)
    parts = {part: {n: torch.randn(shape, generator=g) for n, shape in SHAPES.items()} for part in PARTS}
    return TrainState(**parts, steps=step)


def held(state: TrainState, layout: Layout, rank: int, world: int) -> TrainState:
    """What a rank holds of a whole state, in memory of its own."""
    mine = {part: {n: layout(t, rank, world) for n, t in getattr(state, part).items()} for part in PARTS}
    return TrainState(**mine, steps=state.steps)


def blank(state: TrainState) -> TrainState:
    """The same memory, overwritten."""
    for part in PARTS:
        for tensor in getattr(state, part).values():
            for _, view in ShardedTensor.of(tensor).parts:
                view.fill_(float("nan"))
    return state


def differences(state: TrainState, whole: TrainState) -> list[str]:
    """The tensors that one of both lacks, or of which this rank's part is not as in the whole state, bit for bit."""
    found = []
    for part in PARTS:
        mine, right = getattr(state, part), getattr(whole, part)
        found += [f"{part}.{name}" for name in mine.keys() ^ right.keys()]
        for name in mine.keys() & right.keys():
            places = ShardedTensor.of(mine[name]).places
            if any(not torch.equal(view, right[name][place]) for place, view in places):
                found.append(f"{part}.{name}")
    return found


def single(whole: Tensor, rank: int, world: int) -> Tensor:
    """As plain data parallelism: all of it on every rank."""
    return whole.clone()


def zero3(whole: Tensor, rank: int, world: int) -> ShardedTensor:
    """As DeepSpeed: equal shares of the flattened tensor, with padding behind the last."""
    share = ceil(whole.numel() / world)
    flat = torch.cat([whole.flatten(), torch.full((share,), -1.0)])[rank * share : (rank + 1) * share].clone()
    return ShardedTensor(whole.shape, flat_parts(whole.shape, rank * share, flat))


def fsdp(whole: Tensor, rank: int, world: int) -> ShardedTensor:
    """As FSDP2: rows, fewer or none on the last ranks. What has no rows is on all."""
    if not whole.ndim:
        return ShardedTensor.of(whole.clone())
    share = ceil(len(whole) / world)
    first = min(rank * share, len(whole))
    return ShardedTensor(whole.shape, row_parts(whole.shape, whole[first : first + share].clone(), first))


LAYOUTS: dict[str, Layout] = {f.__name__: f for f in (single, zero3, fsdp)}


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
