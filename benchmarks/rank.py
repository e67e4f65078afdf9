"""One rank of a large world, played by this process: its place among the others, and its engine."""

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from wemmu.config.schema import StageRun
from wemmu.parallel.topology import Topology
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.types import LossFn


def join(rank: int, world: int) -> None:
    """Be `rank` of `world` ranks, of which the others are not there: collectives return at once."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)


def make_engine(model: WeMMU, loss: LossFn, run: StageRun, topology: Topology):
    if run.parallel.engine == "zero3":
        from wemmu.parallel.zero3 import Zero3Engine

        return Zero3Engine(model, loss, run, topology, torch.device("cpu"))
    from wemmu.parallel.hybrid import HybridEngine

    return HybridEngine(model, loss, run, topology, torch.device("cpu"))
