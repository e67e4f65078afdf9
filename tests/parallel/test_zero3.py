"""The engine zero3 is the single one: losses, gradients, norms and weights, with a part of everything on each rank."""

import gc
from collections.abc import Callable
from dataclasses import replace

import deepspeed.runtime.zero.stage3
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import Tensor, nn

from tests.parallel.cases import (
    DESIGNS,
    EDIT,
    NO_GRADIENT,
    STAGES,
    T2I,
    Case,
    Outcome,
    distances,
    go,
    gradient_distance,
    merged,
    single,
)
from tests.parallel.ranks import on_ranks
from tests.parallel.toy import Watched
from wemmu.config import StageRun
from wemmu.config.schema import Backbones
from wemmu.parallel import zero3
from wemmu.parallel.topology import Topology
from wemmu.parallel.zero3 import Zero3Engine
from wemmu.recipes.wemmu.model import WeMMU

BF16 = {f"{name} in bf16": replace(STAGES[name], dtype="bfloat16") for name in ("stage1", "stage3")}
# With four samples, four ranks have no second micro-batch.
TWO_RANKS = {"accumulation": Case(tasks=(EDIT, T2I), accumulation=2), "long": Case(tasks=(EDIT, T2I) * 10)}
LORA = {"lora": Case(tasks=(EDIT, T2I), lora=("pathway", "dit"), ema=0.9, packed=True)}
FLOAT32 = {2: STAGES | DESIGNS | TWO_RANKS | LORA, 4: STAGES | DESIGNS}


def engine_of(model: nn.Module, loss: Callable, run: StageRun) -> Zero3Engine:
    # DeepSpeed collects garbage, which is quick when it need not look at all that was imported.
    gc.freeze()
    return Watched(model, loss, run, Topology(dist.get_rank(), dist.get_world_size()), torch.device("cpu"))


def recomputing(model: WeMMU, loss: Callable, run: StageRun) -> Zero3Engine:
    model.checkpoint_activations()
    engine = engine_of(model, loss, run)
    depth, accumulate = len(FWD_MODULE_STACK), engine.accumulate

    def watched(*arguments):
        losses = accumulate(*arguments)
        assert len(FWD_MODULE_STACK) == depth, "DeepSpeed did not see every recomputed module end"
        return losses

    engine.accumulate = watched
    return engine


def as_it_is() -> None:
    pass


def nothing_stays() -> None:
    """No weight is gathered by chance when it is needed, and buckets are too small for most gradients."""
    zero3.PERSISTENT, zero3.LIVE, zero3.BUCKET = 0, 0, 1000


def run_cases(
    rank: int, world: int, backbones: Backbones, cases: dict[str, Case], make=engine_of, before=as_it_is
) -> dict[str, Outcome]:
    before()
    return {name: go(case, backbones, make, rank, world) for name, case in cases.items()}


def on(world: int, backbones: Backbones, cases: dict[str, Case], *rest: Callable) -> dict[str, Outcome]:
    ranks = on_ranks(world, run_cases, backbones, cases, *rest)
    return {name: merged([rank[name] for rank in ranks]) for name in cases}


@pytest.fixture(scope="module")
def reference(backbones: Backbones) -> dict[str, Outcome]:
    return {name: merged([single(case, backbones)]) for name, case in (FLOAT32[2] | BF16).items()}


def check(ours: Outcome, theirs: Outcome) -> None:
    """Equality but for the order of sums."""
    bounds = {"losses": 1e-5, "norms": 1e-5, "gradients": 1e-5, "weights": 5e-5}
    for part, (worst, place) in distances(ours, theirs).items():
        assert worst < bounds[part], f"{part}: {place} differs by {worst:.1e}"
    largest = max(float(g.abs().max()) for g in theirs.gradients.values())
    for name in theirs.gradients:
        if not name.endswith(NO_GRADIENT):
            continue
        assert float((ours.gradients[name] - theirs.gradients[name]).abs().max()) < 1e-6 * largest, name


@pytest.mark.slow
@pytest.mark.parametrize("world", FLOAT32)
def test_every_stage_and_query_design_equals_the_single_engine(
    backbones: Backbones, reference: dict[str, Outcome], world: int
):
    for name, ours in on(world, backbones, FLOAT32[world]).items():
        check(ours, reference[name])


@pytest.mark.parametrize("make", [engine_of, recomputing], ids=["kept", "recomputed"])
def test_weights_that_are_always_gathered_anew_change_nothing(
    backbones: Backbones, reference: dict[str, Outcome], make: Callable
):
    cases = {name: STAGES[name] for name in ("stage1", "stage4")} | LORA
    for name, ours in on(2, backbones, cases, make, nothing_stays).items():
        check(ours, reference[name])


def test_bf16_rounds_as_the_single_engine_does(backbones: Backbones, reference: dict[str, Outcome]):
    for name, ours in on(2, backbones, BF16).items():
        exact, theirs = reference[name.removesuffix(" in bf16")], reference[name]
        rounding = gradient_distance(theirs, exact)
        assert 1e-3 < rounding < 0.02, "bf16 is not in use, or is wrong"
        assert gradient_distance(ours, exact) < 1.2 * rounding
        assert gradient_distance(ours, theirs) < 1.2 * rounding
        assert ours.norms == pytest.approx(theirs.norms, rel=0.005)
        for a, b in zip(ours.losses, theirs.losses, strict=True):
            assert a == pytest.approx(b, rel=0.005)


# ------------------------------------------------------------------- the exchange counts: without it, nothing is equal
def gradients_are_not_summed() -> None:
    def own_share(tensors: list[Tensor], group=None) -> list[Tensor]:
        return [t.flatten().chunk(dist.get_world_size())[dist.get_rank()].clone() for t in tensors]

    deepspeed.runtime.zero.stage3.reduce_scatter_coalesced = own_share


def gradients_are_averaged() -> None:
    real = Zero3Engine.accumulate

    def accumulate(self, micro_batches, step):
        self._world = 1
        return real(self, micro_batches, step)

    Zero3Engine.accumulate = accumulate


def gradients_are_scaled_a_little() -> None:
    real = Zero3Engine.accumulate

    def accumulate(self, micro_batches, step):
        self._world = 2.0002
        return real(self, micro_batches, step)

    Zero3Engine.accumulate = accumulate


@pytest.mark.parametrize(
    "mutation",
    [gradients_are_not_summed, gradients_are_averaged, gradients_are_scaled_a_little],
    ids=lambda m: m.__name__,
)
def test_with_another_reduction_the_engines_are_not_equal(
    backbones: Backbones, reference: dict[str, Outcome], mutation: Callable
):
    ours = on(2, backbones, {"stage1": STAGES["stage1"]}, engine_of, mutation)
    with pytest.raises(AssertionError):
        check(ours["stage1"], reference["stage1"])
