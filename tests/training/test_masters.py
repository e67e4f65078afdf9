"""A stage in bfloat16 begins with what its sources hold in float32: files, its own initialisation, another stage."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import differing
from tests.models.on_disk import make_backbones
from tests.parallel.cases import ALL, Case, RossCase, portable, whole
from tests.parallel.ranks import on_ranks
from tests.training.test_uae_paths import CONFIG as UAE
from tests.training.test_uae_paths import FEW
from wemmu.checkpoint import store
from wemmu.checkpoint.manifest import Origin
from wemmu.checkpoint.state import TrainState
from wemmu.config import StageRun, load_curriculum
from wemmu.config.schema import Backbones, Parallel
from wemmu.parallel.engine import Engine
from wemmu.parallel.topology import ALONE, Topology
from wemmu.recipes.recipe import Recipe, identities, ready_to_train, recipe
from wemmu.recipes.staged import startable
from wemmu.recipes.wemmu.build import new_bridge
from wemmu.training.build import make_engine, place_blocks
from wemmu.training.start import begin, names_inside

CPU = torch.device("cpu")
# Each carries what it does not train of the bridge.
WHOLE, PART = Case(dtype="bfloat16", trains=ALL), Case(dtype="bfloat16", trains=("position_mlp", "dit"))
TRAINED, ENTRY = ("bridge.", "dit."), "dit.patch_embed.proj.weight"
LAYOUTS = {
    "single": Parallel(),
    "zero3": Parallel(engine="zero3", ranks=2),
    "hybrid": Parallel(engine="hybrid", ranks=2, tp=2),
}


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Backbones:
    return make_backbones(tmp_path_factory.mktemp("small"), layers=2).model_copy(update={"dtype": "bfloat16"})


def run_of(case: Case, backbones: Backbones, start: Path | None = None, engine: str = "single") -> StageRun:
    return case.run.changed({"backbones": backbones, "stage.start": start, "parallel": LAYOUTS[engine]})


def begun(run: StageRun, topology: Topology = ALONE) -> tuple[Recipe, Engine, dict[str, Tensor]]:
    """As `build` begins a stage: the recipe, the engine, and what is carried."""
    made = recipe(run, place_blocks(run, CPU), CPU)
    ready_to_train(made, run)
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    resting = startable(made.model).keys() - trained
    engine = make_engine(run, made.model, made.loss, topology, CPU)
    carried = begin(run, made, engine, resting, names_inside(run, startable(made.model)))
    return made, engine, carried


def sources(backbones: Backbones, made: Recipe) -> dict[str, Tensor]:
    """The float32 values of files and initialisation, by canonical name."""
    dit = load_file(backbones.dit / "diffusion_pytorch_model.safetensors")
    vlm = load_file(backbones.vlm / "model.safetensors")
    # As Qwen2.5-VL was published, and as it is here: both are read.
    language = {n.removeprefix("model.").removeprefix("language_model."): t for n, t in vlm.items()}
    model, run = made.model, WHOLE.run
    channels = model.vae.latent_channels, model.dit.config.caption_channels
    new = new_bridge(run.recipe.bridge, model.vlm.language_model, *channels, run.seed)
    return (
        {f"dit.{name}": tensor for name, tensor in dit.items()}
        | {f"bridge.pathway.{name}": tensor for name, tensor in language.items()}
        | {f"bridge.{name}": p.detach() for name, p in new.named_parameters() if not p.is_meta}
    )


def assert_exact(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    wrong = [name for name, tensor in found.items() if not torch.equal(tensor, expected[name])]
    assert not wrong
    rounded = [name for name, tensor in found.items() if torch.equal(tensor, tensor.bfloat16().float())]
    assert len(rounded) < len(found) / 2, "bfloat16 rounds hardly any of these, so this proves little"


@pytest.fixture(scope="module")
def left(backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """What another stage left: a checkpoint, and the weights in it."""
    return leave(backbones, tmp_path_factory.mktemp("left"))


def leave(backbones: Backbones, root: Path, trains: tuple[str, ...] = ("bridge", "dit")) -> tuple[Path, dict]:
    """Save random weights as a stage of WeMMU does that trains these."""
    made = recipe(run_of(WHOLE, backbones), place_blocks(run_of(WHOLE, backbones), CPU), CPU)
    generator = torch.Generator().manual_seed(5)
    weights = {n: torch.randn(t.shape, generator=generator) for n, t in startable(made.model).items()}
    weights = {n: t for n, t in weights.items() if n.startswith(trains)}
    frozen = {part: sha256 for part, sha256 in identities(made).items() if part not in trains}
    return store.save(root, TrainState(weights, weights, weights, 3), {}, Origin("other", 0, 32, frozen)), weights


def test_masters_and_what_is_carried_are_the_files_and_the_initialisations(backbones: Backbones):
    for case in (WHOLE, PART):
        made, engine, carried = begun(run_of(case, backbones))
        state = engine.state()
        assert_exact(state.weights | {n: t.parts[0][1] for n, t in carried.items()}, sources(backbones, made))
        assert bool(carried) is (case is PART)
        for name, master in state.weights.items():
            working = made.model.get_parameter(name)
            assert working.dtype == torch.bfloat16
            assert torch.equal(working, master.bfloat16()), name


def test_a_stage_that_starts_from_another_loses_nothing_of_it(backbones: Backbones, left):
    directory, weights = left
    made, engine, carried = begun(run_of(PART, backbones, start=directory))
    found = engine.state().weights | {n: t.parts[0][1] for n, t in carried.items()}
    assert found.keys() == weights.keys()
    assert_exact(found, weights)
    # The model computes with what its type leaves of them.
    for name in carried:
        assert torch.equal(made.model.get_parameter(name), weights[name].bfloat16()), name


def test_the_masters_of_a_tuned_vlm_are_the_files(backbones: Backbones):
    _, engine, _ = begun(run_of(RossCase(dtype="bfloat16"), backbones))
    stored = load_file(backbones.vlm / "model.safetensors")
    state = {n.removeprefix("vlm."): t for n, t in engine.state().weights.items() if not n.startswith("head.")}
    published = {"model.language_model.": "model.", "model.visual.": "visual."}
    for name, tensor in state.items():
        prefix = next((p for p in published if name.startswith(p)), "")
        source = stored.get(name, stored.get(published.get(prefix, "") + name.removeprefix(prefix)))
        assert torch.equal(tensor, source), name


@pytest.mark.parametrize("trains", [("bridge",), ("bridge", "dit")])
def test_the_masters_of_a_generators_dit_are_its_file_or_its_checkpoint(
    backbones: Backbones, tmp_path: Path, trains: tuple[str, ...]
):
    checkpoint, weights = leave(backbones, tmp_path, trains)
    objective = ["stages.reward.objective={kind: flow_grpo}", "stages.reward.trains=[dit]"]
    run = load_curriculum(UAE, [*FEW, *objective]).stage_run("reward")
    generator = run.recipe.generator.changed({"weights": checkpoint, "bridge": WHOLE.run.recipe.bridge})
    _, engine, _ = begun(run.changed({"backbones": backbones, "recipe.generator": generator}))
    dit = load_file(backbones.dit / "diffusion_pytorch_model.safetensors")
    expected = {f"dit.{name}": tensor for name, tensor in dit.items()} | weights
    found = {name.removeprefix("generator."): tensor for name, tensor in engine.state().weights.items()}
    assert found.keys() == {f"dit.{name}" for name in dit}
    assert_exact(found, expected)


def test_a_file_in_the_working_type_is_not_read_again(backbones: Backbones, tmp_path: Path):
    small = make_backbones(tmp_path, layers=2).model_copy(update={"dtype": "bfloat16"})
    file = small.dit / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    made, engine, _ = begun(run_of(PART, small))
    assert {name.partition(".")[0] for name in made.sources()} == {"bridge"}
    for name, tensor in load_file(file).items():
        assert torch.equal(engine.state().weights[f"dit.{name}"], tensor.float()), name


def begins(rank: int, world: int, backbones: Backbones, start: Path) -> dict[tuple[str, bool], tuple]:
    """(engine, whether from another stage) -> this rank's parts of masters and of what is carried."""
    found = {}
    for name in ("zero3", "hybrid"):
        for source in (None, start):
            topology = Topology(rank, world, LAYOUTS[name].tp, LAYOUTS[name].pp)
            _, engine, carried = begun(run_of(PART, backbones, source, name), topology)
            found[name, source is not None] = portable(engine.state().weights), portable(carried)
    return found


@pytest.mark.slow
def test_sharded_engines_begin_with_the_same(backbones: Backbones, left):
    directory, weights = left
    ranks = on_ranks(2, begins, backbones, directory)
    made = recipe(run_of(PART, backbones), place_blocks(run_of(PART, backbones), CPU), CPU)
    for key in ranks[0]:
        masters, carried = (whole([rank[key][i] for rank in ranks]) for i in (0, 1))
        assert_exact(masters | carried, weights if key[1] else sources(backbones, made))


def begins_wider(rank: int, world: int, backbones: Backbones, start: Path, engine: str = "zero3") -> dict:
    """(type, whether the DiT learns) -> this rank's parts of masters, of what is carried and of all live weights."""
    found = {}
    for dtype in ("bfloat16", "float32"):
        for case in (PART, Case(trains=ALL[:3])):
            run = run_of(case, backbones, start, engine)
            run = run.changed({"backbones.dtype": dtype, "recipe.bridge.source_latents": True})
            made, own, carried = begun(run, Topology(rank, world))
            live = own.local_parameters([name for name, _ in made.model.named_parameters() if name.startswith(TRAINED)])
            parts = (own.state().weights, carried, live)
            found[dtype, "dit" in case.trains] = [portable(one) for one in parts]
    return found


@pytest.mark.slow
def test_a_sharded_start_that_widens_is_the_start_of_one_process(backbones: Backbones, left):
    """The DiT of the stage takes source latents; the checkpoint's does not."""
    directory, weights = left
    ranks, alone = on_ranks(2, begins_wider, backbones, directory), begins_wider(0, 1, backbones, directory, "single")
    for key in alone:
        for part, expected in enumerate(alone[key]):
            ours, theirs = whole([rank[key][part] for rank in ranks]), whole([expected])
            assert differing(ours, theirs) == [], (key, part)
        masters, carried, _ = (whole([one]) for one in alone[key])
        wide = (masters | carried)[ENTRY]
        assert torch.equal(wide[:, : wide.shape[1] // 2], weights[ENTRY])
        assert not wide[:, wide.shape[1] // 2 :].any()
