"""Every kind of stage that a shipped config trains takes steps with its engine, in its type, on small real backbones.

What a kind is, is read from the configs, so that a new one cannot escape.
"""

import json
import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from tests.config.curricula import load_shipped
from tests.models.world import micro_batches
from tests.parallel.ranks import on_ranks
from wemmu.config import StageRun
from wemmu.config.schema import Backbones
from wemmu.parallel.topology import Topology
from wemmu.recipes.recipe import ready_to_train, recipe
from wemmu.training.build import give_kernels, make_engine, place_blocks
from wemmu.training.start import fill_empty

REPOSITORY = Path(__file__).parents[2]
EXAMPLE = REPOSITORY / "assets/shapes/examples/first.png"
GLOBAL_BATCH, STEPS = 4, 2


def shipped(export: Path) -> dict[str, StageRun]:
    """One stage of each kind; a curriculum is what has stages, or a base that has."""
    kinds: dict[str, StageRun] = {}
    for file in sorted((REPOSITORY / "configs").rglob("*.yaml")):
        if {"stages", "base"} & OmegaConf.load(file).keys():
            curriculum = load_shipped(file, export)
            for name in (stage.name for stage in curriculum.stages):
                run = curriculum.stage_run(name)
                kinds.setdefault(json.dumps(kind(run), sort_keys=True), run)
    return kinds


def kind(run: StageRun) -> dict:
    """What of a stage decides whether its engine can take it."""
    return {
        "engine": run.parallel.engine,
        "tp": run.parallel.tp > 1,
        "pp": run.parallel.pp > 1,
        "dtype": run.backbones.dtype,
        "objective": run.stage.objective.kind,
        "trains": sorted(run.stage.trains),
        "recipe": run.recipe.model_dump(mode="json"),
        "checkpointing": run.memory.checkpointing,
        "compile": run.kernels.compile,
    }


def shrunk(run: StageRun, backbones: Backbones) -> StageRun:
    """The stage with all that makes it what it is, and nothing of its size. Two ranks where it has several."""
    tree = run.model_dump(mode="json")
    tree["backbones"] |= {name: str(getattr(backbones, name)) for name in ("vlm", "vae", "dit")}
    if run.parallel.ranks > 1 or run.parallel.engine != "single":
        tree["parallel"] |= {"ranks": 2, "tp": min(run.parallel.tp, 2)}
        tree["parallel"]["pp"] = min(run.parallel.pp, 2 // tree["parallel"]["tp"])
    if run.recipe.kind == "wemmu":
        tree["recipe"]["bridge"] |= {"position_table": 8}
    elif run.recipe.kind == "ross" and tree["recipe"]["head"]["kind"] == "denoiser":
        tree["recipe"]["head"] |= {"width": 32, "heads": 2, "depth": 2}
    tree["sampling"] |= {"steps": 2, "prompts": [{"text": "describe the image", "images": [str(EXAMPLE)]}]}
    tree["stage"] |= {"resolution": 32, "resolutions": [], "next_resolution": None, "start": None}
    tree["stage"]["global_batch"] = GLOBAL_BATCH
    tree["threads"] = 1
    return StageRun.model_validate(tree)


def trains(rank: int, world: int, runs: dict[str, StageRun]) -> dict[str, list[float]]:
    """The norms of the gradients of some steps; between them the fixed prompts are drawn, as in training."""
    norms: dict[str, list[float]] = {}
    for name, run in runs.items():
        device = torch.device("cpu")
        made = recipe(run, place_blocks(run, device), device)
        ready_to_train(made, run)
        topology = Topology(rank, world, run.parallel.tp, run.parallel.pp)
        chosen, compiled = give_kernels(run, made.model, device)
        empty = {name for name, parameter in made.model.named_parameters() if parameter.is_meta}
        engine = make_engine(run, made.model, made.loss, topology, device, chosen.adamw == "Apex", compiled)
        if empty:
            fill_empty(made, engine, empty)
        norms[name] = []
        for step, task in zip(range(STEPS), list(run.stage.mixture) * STEPS, strict=False):
            ids = [10 * step + i for i in range(GLOBAL_BATCH)]
            engine.accumulate(micro_batches(made.encoder, ids, task, rank, world, accumulation=1), step)
            norms[name].append(engine.step(1.0))
            _, blank = made.preview()
            assert blank == 0, f"what {name} draws is blank"
            if step == 0:
                # As a resume does it, with what a checkpoint holds.
                state = engine.state()
                assert {t.dtype for t in state.weights.values()} == {torch.float32}
                engine.on_restore(state.steps)
    return norms


@pytest.mark.parametrize("world", [1, 2])
def test_every_kind_of_stage_that_is_shipped_takes_steps(backbones: Backbones, world: int, tmp_path: Path) -> None:
    # Stages of UAE need captions or a generator: tests/parallel/test_zero3_uae.py.
    found = shipped(tmp_path / "export")
    small = {name: shrunk(run, backbones) for name, run in found.items() if run.recipe.kind != "uae"}
    assert {run.parallel.ranks for run in small.values()} <= {1, 2}
    here = {name: run for name, run in small.items() if run.parallel.ranks == world}
    exact = {
        name: run.model_copy(
            update={
                "backbones": run.backbones.model_copy(update={"dtype": "float32"}),
                "parallel": run.parallel.model_copy(update={"engine": "single", "ranks": 1, "tp": 1, "pp": 1}),
            }
        )
        for name, run in here.items()
    }
    if not here:
        pytest.skip(f"no config of {world} ranks is shipped")
    found = on_ranks(world, trains, here)
    assert all(rank == found[0] for rank in found), "the ranks do not agree on the norm"
    reference = on_ranks(1, trains, exact)[0] if exact != here else found[0]
    for name, norms in found[0].items():
        assert all(math.isfinite(norm) and norm > 0 for norm in norms)
        assert norms == pytest.approx(reference[name], rel=0.05), name
