"""The hybrid engine, at any degrees, is the single one: losses, gradients, norms, weights, and what it saves."""

import gc
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard import _fsdp_collectives

from tests.models.world import make_batch
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
    portable,
    single,
)
from tests.parallel.ranks import on_ranks
from tests.parallel.test_zero3_start import alive
from wemmu.config.schema import Backbones
from wemmu.parallel import boundary, hybrid, pipeline, shards, tensor_layers
from wemmu.parallel.hybrid import HybridEngine
from wemmu.parallel.topology import AXES, Topology
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.build import build_model, sources
from wemmu.recipes.wemmu.config import Bridge, Queries
from wemmu.recipes.wemmu.loss import FlowMatchingLoss
from wemmu.training.start import fill_empty

CPU = torch.device("cpu")
# Ranks, tp, pp.
LAYOUTS = {
    "dp2": (2, 1, 1),
    "tp2": (2, 2, 1),
    "pp2": (2, 1, 2),
    "tp2 x pp2": (4, 2, 2),
    "dp2 x tp2": (4, 2, 1),
    "dp2 x pp2": (4, 1, 2),
}
CASES = STAGES | DESIGNS
# What two ranks are enough for, and what is long.
ACCUMULATED = {"accumulation": Case(tasks=(EDIT, T2I), accumulation=2)}
LONG = {"twenty steps": Case(tasks=(EDIT, T2I) * 10), "clipped": Case(clip=0.01)}
EXACT = {"one step": Case()}
BF16 = {"one step in bf16": Case(dtype="bfloat16")}


def run_cases(
    rank: int, world: int, backbones: Backbones, cases: dict[str, Case], tp: int, pp: int
) -> dict[str, Outcome]:
    topology = Topology(rank, world, tp, pp)
    return {
        name: go(case, backbones, lambda m, loss, run: HybridEngine(m, loss, run, topology, CPU), rank, world)
        for name, case in cases.items()
    }


def in_layout(layout: str, backbones: Backbones, cases: dict[str, Case]) -> dict[str, Outcome]:
    world, tp, pp = LAYOUTS[layout]
    ranks = on_ranks(world, run_cases, backbones, cases, tp, pp)
    return {name: merged([rank[name] for rank in ranks]) for name in cases}


@pytest.fixture(scope="module")
def reference(backbones: Backbones) -> dict[str, Outcome]:
    return {
        name: merged([single(case, backbones)]) for name, case in (CASES | ACCUMULATED | LONG | EXACT | BF16).items()
    }


def compare(ours: Outcome, theirs: Outcome, gradients: float, weights: float) -> None:
    bounds = dict.fromkeys(("losses", "norms"), max(gradients, weights)) | {"gradients": gradients, "weights": weights}
    for part, (worst, place) in distances(ours, theirs).items():
        assert worst < bounds[part], f"{part}: {place} differs by {worst:.1e}"
    for name in theirs.weights:
        if name.endswith(NO_GRADIENT):
            assert float((ours.weights[name] - theirs.weights[name]).abs().max()) < 0.1, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_stage_and_query_design_has_the_single_engines_losses_and_gradients(
    backbones: Backbones, reference: dict[str, Outcome], layout: str
):
    # With four samples, four ranks have no second micro-batch.
    cases = CASES | (ACCUMULATED if LAYOUTS[layout][0] == 2 else {})
    for name, ours in in_layout(layout, backbones, cases).items():
        compare(ours, reference[name], gradients=1e-5, weights=1e-4)


@pytest.mark.slow
def test_the_weights_agree_after_twenty_steps_and_under_a_tight_clip(
    backbones: Backbones, reference: dict[str, Outcome]
):
    for name, ours in in_layout("tp2 x pp2", backbones, LONG).items():
        compare(ours, reference[name], gradients=1e-5, weights=1e-3)


def test_bf16_is_as_far_from_float32_as_the_single_engines_bf16(backbones: Backbones, reference: dict[str, Outcome]):
    for name, ours in in_layout("tp2 x pp2", backbones, BF16).items():
        exact, single = reference["one step"], reference[name]
        rounding = gradient_distance(single, exact)
        assert 1e-3 < rounding < 0.1, "bf16 is not in use, or is wrong"
        assert gradient_distance(ours, exact) < 1.3 * rounding
        for a, b in zip(ours.losses, exact.losses, strict=True):
            assert a == pytest.approx(b, rel=0.02)


def test_every_rank_has_its_place_and_groups_are_along_one_axis():
    grid = [Topology(rank, 12, tp=2, pp=3) for rank in range(12)]
    places = [(t.data, t.stage, t.tensor) for t in grid]
    assert sorted(set(places)) == sorted(places) == [(d, s, t) for d in range(2) for s in range(3) for t in range(2)]
    for axis, name in enumerate(AXES):
        groups = grid[0].groups(name)
        assert sorted(rank for group in groups for rank in group) == list(range(12))
        for group in groups:
            assert [places[rank][axis] for rank in group] == list(range(len(group)))
            assert len({tuple(np.delete(places[rank], axis)) for rank in group}) == 1
    assert all(
        places[rank][0] == data for data, group in enumerate(grid[0].groups("stage", "tensor")) for rank in group
    )


def velocities(rank: int, world: int, backbones: Backbones, tp: int, pp: int) -> tuple[Tensor, Outcome]:
    """Samples are drawn between the steps, by all ranks alike."""
    case, drawn = STAGES["stage2"], []

    class Drawing(HybridEngine):
        def __init__(self, model, *rest):
            super().__init__(model, *rest)
            self.model = model

        def step(self, lr_share: float) -> float:
            norm = super().step(lr_share)
            drawn.append(velocity_of(self.model, PromptEncoder(backbones.vlm)))
            return norm

    outcome = go(
        case, backbones,
        lambda m, loss, run: Drawing(m, loss, run, Topology(rank, world, tp, pp), CPU), rank, world,
    )  # fmt: skip
    return drawn[-1].numpy(), outcome


@torch.no_grad()
def velocity_of(model, encoder: PromptEncoder) -> Tensor:
    loss, batch = FlowMatchingLoss(model, STAGES["stage2"].run), make_batch(encoder, [1, 2, 3])
    flow = loss.draw(batch, 0)
    return model.velocity(flow.x_t, flow.t, loss.condition(batch, 0))


@pytest.mark.parametrize("layout", ["dp2 x tp2", "dp2 x pp2"])
def test_samples_drawn_between_steps_are_the_single_engines_and_disturb_nothing(
    backbones: Backbones, reference: dict[str, Outcome], layout: str
):
    world, tp, pp = LAYOUTS[layout]
    ranks = on_ranks(world, velocities, backbones, tp, pp)
    compare(merged([outcome for _, outcome in ranks]), reference["stage2"], gradients=1e-5, weights=1e-4)
    model = STAGES["stage2"].model(backbones)
    weights = reference["stage2"].weights
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in weights:
                parameter.copy_(weights[name])
    expected = velocity_of(model, PromptEncoder(backbones.vlm))
    for velocity, _ in ranks:
        assert np.array_equal(velocity, ranks[0][0])
        torch.testing.assert_close(torch.from_numpy(velocity), expected, rtol=1e-3, atol=1e-3)


# ------------------------------------------------------------- every exchange counts: without one, ranks are not equal
def gradients_are_not_summed() -> None:
    def own_share(self, output_tensor, input_tensor, group, op, async_op=False):
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])

    _fsdp_collectives.DefaultReduceScatter.__call__ = own_share


def conditions_are_not_gathered() -> None:
    real = boundary.Boundary._gather
    boundary.Boundary._gather = lambda self, value: [
        real(self, value)[self._group.rank()].clone() for _ in range(self.size)
    ]


def a_gradient_is_not_given_back() -> None:
    real = boundary.Boundary.give_back
    boundary.Boundary.give_back = lambda self, values, like, source: (
        real(self, values, like, source) * (like.ndim == 1 or self._group.rank() == 0)
    )


def later_stages_do_not_reach_the_condition() -> None:
    real = pipeline.StageRunner.forward

    def forward(self, *inputs):
        out = real(self, *inputs)
        return out if self.part.is_last else (out[0], out[1].detach().requires_grad_(), *out[2:])

    pipeline.StageRunner.forward = forward


def the_norm_is_of_one_rank() -> None:
    hybrid.dist = SimpleNamespace(all_reduce=lambda square: square, group=dist.group)


def replicas_count_twice() -> None:
    hybrid.HybridEngine._norm = replicated_norm


def replicated_norm(self: HybridEngine) -> float:
    square = torch.stack([w.grad.square().sum() for w in self._adamw.weights.values()]).sum()
    dist.all_reduce(square)
    return float(square) ** 0.5


def tensor_ranks_do_not_add_up() -> None:
    tensor_layers._all_reduced = lambda x, group: x


MUTATIONS = [
    gradients_are_not_summed,
    conditions_are_not_gathered,
    a_gradient_is_not_given_back,
    later_stages_do_not_reach_the_condition,
    the_norm_is_of_one_rank,
    replicas_count_twice,
    tensor_ranks_do_not_add_up,
]


def mutated(rank: int, world: int, backbones: Backbones, mutation, tp: int, pp: int) -> Outcome:
    mutation()
    return run_cases(rank, world, backbones, {"case": STAGES["stage2"]}, tp, pp)["case"]


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_without_any_one_exchange_the_engines_are_not_equal(
    backbones: Backbones, reference: dict[str, Outcome], mutation
):
    with pytest.raises(AssertionError):
        compare(
            merged(on_ranks(4, mutated, backbones, mutation, 2, 2)), reference["stage2"], gradients=1e-5, weights=1e-4
        )


def starts(rank: int, world: int, backbones: Backbones, tp: int, pp: int) -> tuple[dict, dict, dict[str, int]]:
    """Weights of an engine that was given the whole model, and of one that was given none; the memory of the latter."""
    topology, case = Topology(rank, world, tp, pp), Case()
    names = [name for name in dict(case.model(backbones).named_parameters()) if name.startswith(("bridge.", "dit."))]
    whole = case.model(backbones)
    given = portable(HybridEngine(whole, case.loss(whole), case.run, topology, CPU).local_parameters(names))
    del whole
    gc.freeze()
    before, sizes, units = alive(), [], []
    config = Bridge(queries=Queries(design="noisy", number=9), position_table=8)
    model, _ = build_model(backbones, config, 3, on_block_loaded=None)
    model.freeze_all_but(case.trains)
    empty = {name for name, parameter in model.named_parameters() if parameter.is_meta}
    frozen = sum(p.nbytes for part in (model.vlm, model.vae) for p in part.parameters())
    trainable = {name: p for part in ("bridge", "dit") for name, p in model.get_submodule(part).named_parameters()}
    total = sum(p.numel() * 4 for p in trainable.values())
    units = [*model.bridge.pathway.layers, *model.dit.transformer_blocks]
    largest = max(sum(p.numel() * 4 for p in unit.parameters()) for unit in units)
    with mock.patch.object(shards, "trim", side_effect=lambda: sizes.append(alive() - before)):
        engine = HybridEngine(model, case.loss(model), case.run, topology, CPU)
    made = SimpleNamespace(sources=lambda every: sources(backbones, config, 3, model, every))
    fill_empty(made, engine, empty)
    memory = {"peak": max(sizes), "frozen": frozen, "trainable": total, "largest": largest, "empty": len(empty)}
    return given, portable(engine.local_parameters(names)), memory


@pytest.mark.slow
def test_a_rank_reads_its_own_slices_and_never_holds_the_whole_model(backbones: Backbones):
    world, tp, pp = LAYOUTS["dp2 x tp2"]
    ranks = on_ranks(world, starts, backbones, tp, pp)
    given, read, memories = (list(each) for each in zip(*ranks, strict=True))
    for mine, theirs in zip(given, read, strict=True):
        assert mine.keys() == theirs.keys()
        for name, (shape, parts) in mine.items():
            assert shape == theirs[name][0]
            assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(parts, theirs[name][1], strict=True)), name
    for memory in memories:
        assert memory["empty"] > 100
        # Shards that are not read yet, and one unit before it is sharded; buffers and new parts besides.
        assert memory["peak"] < memory["frozen"] + memory["trainable"] / 2 + 2 * memory["largest"] + 400_000
