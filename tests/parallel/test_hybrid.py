"""The hybrid engine, at any degrees, is the single one: losses, gradients, norms and weights."""

from collections.abc import Callable

import pytest
import torch

from tests.parallel.cases import DESIGNS, STAGES, Case, Outcome, difference, go, merged, single
from tests.parallel.ranks import on_ranks
from wemmu.config.schema import Backbones
from wemmu.parallel.hybrid import HybridEngine
from wemmu.parallel.topology import Topology

CPU = torch.device("cpu")
# (ranks, tp, pp)
LAYOUTS = {"dp2": (2, 1, 1), "tp2": (2, 2, 1), "pp2": (2, 1, 2), "tp2 x pp2": (4, 2, 2), "dp2 x tp2": (4, 2, 1), "dp2 x pp2": (4, 1, 2)}


def hybrid(rank: int, world: int, backbones: Backbones, cases: dict[str, Case], tp: int, pp: int) -> dict[str, Outcome]:
    topology = Topology(rank, world, tp, pp)
    return {
        name: go(case, backbones, lambda m, loss, run: HybridEngine(m, loss, run, topology, CPU), rank, world)
        for name, case in cases.items()
    }


@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages(backbones: Backbones, layout: str):
    world, tp, pp = LAYOUTS[layout]
    ranks = on_ranks(world, hybrid, backbones, STAGES, tp, pp)
    for name, case in STAGES.items():
        ours, theirs = merged([rank[name] for rank in ranks]), merged([single(case, backbones)])
        print(name, layout, difference(ours.gradients, theirs.gradients, 1e-4), difference(ours.weights, theirs.weights, 1e-4), ours.norms, theirs.norms)
        for a, b in zip(ours.losses, theirs.losses, strict=True):
            assert a == pytest.approx(b, rel=1e-4)
