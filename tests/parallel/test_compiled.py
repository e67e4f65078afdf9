"""Sharded engines with compiled layers: the single engine's results, and one graph for all layers of a kind."""

import os
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from tests.models.world import micro_batches
from tests.parallel.cases import EDIT, GLOBAL_BATCH, STAGES, T2I, Case, Outcome, distances, go, merged, single
from tests.parallel.ranks import on_ranks
from wemmu import kernels
from wemmu.config import StageRun
from wemmu.config.schema import Backbones
from wemmu.kernels import Kernels
from wemmu.parallel.engine import Engine
from wemmu.parallel.topology import Topology
from wemmu.recipes.recipe import ready_to_train, recipe
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.training.build import give_kernels, make_engine, place_blocks

CPU = torch.device("cpu")
# The last one: the first layer's input has no gradient, which DeepSpeed waits for.
CASES = {
    "all": Case(tasks=(EDIT, T2I, EDIT, T2I)),
    "stage 1 recomputed": STAGES["stage1"],
    "pathway alone": Case(trains=("pathway",)),
}
# Engine, tp, pp.
LAYOUTS = {"zero3": ("zero3", 1, 1), "dp 2": ("hybrid", 1, 1), "pp 2": ("hybrid", 1, 2), "tp 2": ("hybrid", 2, 1)}


def run_cases(
    rank: int, world: int, backbones: Backbones, engine: str, tp: int, pp: int
) -> dict[str, tuple[Outcome, list[int]]]:
    """By case what comes out, and the number of graphs before and after each step; none is broken."""
    # The same hooks and saved tensors as with inductor's code, which takes a C++ compiler minutes.
    torch.compile = partial(torch.compile, backend="aot_eager")
    found = {}
    for name, case in CASES.items():
        graphs: list[int] = []

        def make(model: WeMMU, loss: Callable, run: StageRun, name: str = name, graphs: list[int] = graphs) -> Engine:
            if "recomputed" in name:
                model.checkpoint_activations()
            layers: Sequence[nn.Module] = (*model.bridge.pathway.layers, *model.dit.transformer_blocks)
            chosen = Kernels("torch", "plain", "", "", compiled=True)
            kernels.apply(chosen, type(model.vlm.language_model.norm), (), layers)
            run = run.model_copy(update={"parallel": run.parallel.model_copy(update={"engine": engine})})
            made = make_engine(run, model, loss, Topology(rank, world, tp, pp), CPU, compiled=layers)
            accumulate = made.accumulate

            def watched(*arguments):
                graphs.append(counters["stats"]["unique_graphs"])
                return accumulate(*arguments)

            made.accumulate = watched
            return made

        torch._dynamo.reset()
        counters.clear()
        outcome = go(case, backbones, make, rank, world)
        assert not counters["graph_break"]
        found[name] = outcome, [*graphs, counters["stats"]["unique_graphs"]]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_sharded_engine_with_compiled_layers_is_the_single_one(backbones: Backbones, layout: str):
    ranks = on_ranks(2, run_cases, backbones, *LAYOUTS[layout], timeout=1200)
    for name, case in CASES.items():
        ours, theirs = merged([rank[name][0] for rank in ranks]), merged([single(case, backbones)])
        for part, (worst, place) in distances(ours, theirs).items():
            assert worst < 5e-5, f"{name}, {part}: {place} differs by {worst:.1e}"
    for rank in ranks:
        graphs = rank["all"][1]
        # Two tasks, two kinds of layers of three each, and the first layer's input has strides of its own.
        assert 0 < graphs[2] <= 6, graphs
        assert graphs[2:] == graphs[2:3] * 3, "a shape that was compiled is compiled again"


def steps_where_one_cannot(
    rank: int, world: int, backbones: Backbones, compile: bool | str
) -> tuple[Kernels, float] | str:
    """The kernels and the norm of a gradient, or why there are none; the last rank's machine has no compiler."""
    torch.compile = partial(torch.compile, backend="aot_eager")
    # As on a GPU in bfloat16.
    kernels.fast = lambda device, dtype: True
    if rank == world - 1:
        os.environ |= {"PATH": "", "CXX": ""}
    run = Case().run.changed({"backbones": backbones, "parallel.engine": "zero3", "kernels.compile": compile})
    made = recipe(run, place_blocks(run, CPU), CPU)
    ready_to_train(made, run)
    try:
        chosen, compiled = give_kernels(run, made.model, CPU)
    except ValueError as error:
        return str(error)
    engine = make_engine(run, made.model, made.loss, Topology(rank, world), CPU, compiled=compiled)
    engine.accumulate(micro_batches(made.encoder, list(range(GLOBAL_BATCH)), EDIT, rank, world, 1), 0)
    return chosen, float(engine.step(1.0))


@pytest.mark.skipif(kernels.compiler() is None, reason="torch.compile needs a C++ compiler")
def test_layers_are_compiled_on_all_ranks_or_on_none(backbones: Backbones):
    """Else one rank would gather a layer at once and another matrix by matrix: gloo fails, NCCL would wait."""
    (first, norm), (second, other) = on_ranks(2, steps_where_one_cannot, backbones, "auto", timeout=120)
    assert first == second
    assert norm == other
    assert not first.compiled
    assert first.norms == "torch"
    (told,) = first.refused
    assert "layers are not compiled" in told
    assert "rank 1 on " in told
    assert "there is no C++ compiler" in told


@pytest.mark.skipif(kernels.compiler() is None, reason="torch.compile needs a C++ compiler")
def test_where_one_rank_cannot_compile_what_must_be_compiled_all_say_so(backbones: Backbones):
    first, second = on_ranks(2, steps_where_one_cannot, backbones, True, timeout=120)
    assert first == second
    assert first.startswith("kernels.compile: rank 1 on ")
    assert "there is no C++ compiler" in first
