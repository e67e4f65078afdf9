"""A run goes on in any layout from a checkpoint of any other: the same state, bit for bit, and the same losses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel.cases import EDIT, T2I, Case, MakeEngine, Run, portable, whole
from tests.parallel.ranks import on_ranks
from wemmu.checkpoint import store
from wemmu.checkpoint.manifest import Origin
from wemmu.config.schema import Backbones
from wemmu.parallel.hybrid import HybridEngine
from wemmu.parallel.single import SingleEngine
from wemmu.parallel.topology import Topology
from wemmu.parallel.zero3 import Zero3Engine

CPU = torch.device("cpu")
# Number of ranks -> the layouts with as many: engine, tp, pp.
LAYOUTS = {
    1: {"single": ("single", 1, 1)},
    2: {"zero3 x 2": ("zero3", 1, 1), "tp2": ("hybrid", 2, 1), "pp2": ("hybrid", 1, 2)},
    4: {"zero3 x 4": ("zero3", 1, 1), "tp2 x pp2": ("hybrid", 2, 2)},
}
NAMES = [name for layouts in LAYOUTS.values() for name in layouts]
CASE = Case(ema=0.9, tasks=(EDIT, T2I))
# The loss of the second step more depends on the moments, too.
SAVED_AT, MORE = 2, 2
# State is compared bit for bit; what is computed from it, within the order of sums.
BOUND = 1e-4


def training(layout: tuple[str, int, int], backbones: Backbones, rank: int, world: int) -> Run:
    """In one layout."""
    kind, tp, pp = layout
    topology = Topology(rank, world, tp, pp)
    engines: dict[str, MakeEngine] = {
        "single": SingleEngine,
        "zero3": lambda model, loss, run: Zero3Engine(model, loss, run, topology, CPU),
        "hybrid": lambda model, loss, run: HybridEngine(model, loss, run, topology, CPU),
    }
    return Run(CASE, backbones, engines[kind], rank, world)


def state_of(run: Run) -> dict[str, Any]:
    state = run.engine.state()
    assert state.steps == SAVED_AT
    return {part: portable(getattr(state, part)) for part in ("weights", "exp_avg", "exp_avg_sq", "ema")}


def save_all(rank: int, world: int, backbones: Backbones, root: Path) -> dict[str, Any]:
    """Train, save, note the state, and train on: of each layout of this number of ranks."""
    found = {}
    for name, layout in LAYOUTS[world].items():
        run = training(layout, backbones, rank, world)
        run.steps(0, SAVED_AT)
        store.save(root / name, run.engine.state(), {}, Origin("stage", 0, 32, {}, {"engine": name}))
        found[name] = state_of(run), run.steps(SAVED_AT, MORE)
    return found


def load_all(rank: int, world: int, backbones: Backbones, root: Path) -> dict[tuple[str, str], Any]:
    """(from, to) -> state and next losses, for each layout of this number of ranks."""
    found = {}
    for name, layout in LAYOUTS[world].items():
        run = training(layout, backbones, rank, world)
        run.steps(7, 1)
        for source in NAMES:
            # What was there before, be it of another run, must leave no trace.
            manifest = store.load_newest(root / source, run.engine.state())
            run.engine.on_restore(manifest.step)
            found[source, name] = state_of(run), run.steps(SAVED_AT, MORE)
    return found


def everywhere(function, *arguments: Any) -> dict:
    """What each layout gave: the whole state and the losses of all samples."""
    merged = {}
    for world in LAYOUTS:
        ranks = on_ranks(world, function, *arguments, timeout=900)
        for key in ranks[0]:
            states, losses = zip(*(rank[key] for rank in ranks), strict=True)
            state = {part: whole([s[part] for s in states]) for part in states[0]}
            merged[key] = state, [{i: v for one in step for i, v in one.items()} for step in zip(*losses, strict=True)]
    return merged


@pytest.fixture(scope="module")
def saved(backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    root = tmp_path_factory.mktemp("saved")
    return root, everywhere(save_all, backbones, root)


@pytest.mark.slow
def test_any_layout_goes_on_from_any_other(backbones: Backbones, saved: tuple[Path, dict]):
    root, before = saved
    after = everywhere(load_all, backbones, root)
    assert after.keys() == {(source, target) for source in NAMES for target in NAMES}
    for (source, target), (state, losses) in after.items():
        expected, straight = before[source]
        for part, tensors in expected.items():
            assert tensors.keys() == state[part].keys()
            differing = [name for name in tensors if not torch.equal(tensors[name], state[part][name])]
            assert not differing, f"{part} of {differing[:3]}, from {source} to {target}"
        for ours, theirs in zip(losses, straight, strict=True):
            same = source == target
            assert ours == (theirs if same else pytest.approx(theirs, rel=BOUND)), f"from {source} to {target}"
