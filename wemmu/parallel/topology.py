"""Ranks as a value: the rank of this process, its groups, and the axes of the grid."""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed as dist

AXES = ("data", "stage", "tensor")


@dataclass(frozen=True)
class Topology:
    """`world` ranks as a grid [data, stage, tensor], the last axis running fastest.

    Ranks of one model group, which share a DiT, are neighbours, so that they can sit on one node. Every rank reads
    samples of its own and runs the bridge on them: the loader and the noise know `rank` and `world` and nothing of the
    grid. Tensor ranks and stages see the same samples of the DiT because the boundary hands them out
    (`wemmu.parallel.boundary`), never because they read or draw the same.
    """

    rank: int = 0
    world: int = 1
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        assert self.world % (self.tp * self.pp) == 0, "the config refuses such degrees"
        assert 0 <= self.rank < self.world

    @property
    def tensor(self) -> int:
        return self.rank % self.tp

    @property
    def stage(self) -> int:
        return self.rank // self.tp % self.pp

    @property
    def data(self) -> int:
        return self.rank // (self.tp * self.pp)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes what is written once."""
        return self.rank == 0

    def groups(self, *axes: str) -> list[list[int]]:
        """Return the groups of ranks that differ on these axes only; the axes are neighbours in `AXES`."""
        sizes = self.world // (self.tp * self.pp), self.pp, self.tp
        moved = [AXES.index(axis) for axis in axes]
        grid = torch.arange(self.world).view(sizes).movedim(moved, [axis - len(axes) for axis in range(len(axes))])
        return grid.reshape(-1, prod(sizes[axis] for axis in moved)).tolist()

    def group(self, *axes: str) -> dist.ProcessGroup:
        """Return the process group of this rank's list in `groups`. All ranks must call this in the same order."""
        group, _ = dist.new_subgroups_by_enumeration(self.groups(*axes))
        return group


# One process that trains by itself.
ALONE = Topology()


def any_rank(flag: bool) -> bool:
    """Return whether `flag` is set on any rank; all ranks must call this."""
    if not dist.is_initialized():
        return flag
    flags = torch.tensor([flag], dtype=torch.uint8)
    dist.all_reduce(flags, dist.ReduceOp.MAX)
    return bool(flags)


def rank() -> int:
    """Return the number of this rank, whose value `gathered` has at this place."""
    return dist.get_rank() if dist.is_initialized() else 0


def gathered(value: object) -> list[Any]:
    """Return the values of all ranks in order; all must call it."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
