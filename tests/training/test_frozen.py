"""Frozen parts take less memory, in 8 or 4 bit: bounded errors, and a stage that trains, resumes and exports.

Offload to host memory has its tests in test_second_device.py.
"""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from tests.checkpoints import differing
from tests.data.handmade import all_tasks, write
from tests.models.world import make_batch
from tests.training.runs import STAGE, make_run, train
from tests.training.test_lora import load_weights, velocity, with_checkpoint
from tools.convert_ckpt import export, find
from wemmu.backbones.quantized import QuantizedLinear, pack, quantizable
from wemmu.backbones.weights import load_vlm
from wemmu.checkpoint.adapters import is_adapter
from wemmu.checkpoint.manifest import read_manifest
from wemmu.config import load_curriculum
from wemmu.config.schema import Backbones, StageRun
from wemmu.config.task import Task
from wemmu.planning.ask import Item, ask
from wemmu.planning.layout import Degrees, RankWorkload, states
from wemmu.planning.layout import checkpoint as stored_bytes
from wemmu.published.layout import BackboneError
from wemmu.recipes.lora import merge
from wemmu.recipes.recipe import quantize, recipe
from wemmu.training.build import load_trained

SHAPES = Path(__file__).parents[2] / "configs" / "shapes"
LORA = {"pathway": {"rank": 2}, "dit": {"rank": 2}}
ALL = {"vlm": "nf4", "pathway": "int8", "dit": "nf4"}
# Of keys and values against those of the full weights, relative, which grow layer by layer; tiny random weights.
BOUND = {"nf4": 0.4, "int8": 0.04}


def run_of(backbones: Backbones, shards: Path, quantize: object, **changes: object) -> StageRun:
    stage = {**STAGE, "steps": 2, "optimizer": {"lr": 1e-2, "module_lr": {"dit": 1e-2}}, **changes.pop("stage", {})}
    memory = {"micro_batch": 2, "reference_resolution": 32, "quantize": quantize}
    model = {"kind": "wemmu", "bridge": {"position_table": 8}, "lora": changes.pop("lora", LORA)}
    logging = {"every": 1, "checkpoint_every": 1, "samples_every": 2, "wandb": "disabled", "keep_checkpoints": 9}
    return make_run(backbones, shards, stages=[stage], memory=memory, recipe=model, logging=logging, **changes)


@pytest.fixture(scope="module")
def trained(backbones: Backbones, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StageRun, Path]:
    run = run_of(backbones.model_copy(update={"dtype": "bfloat16"}), shards, ALL)
    return run, train(run, tmp_path_factory.mktemp("packed") / "stage")


@pytest.mark.parametrize("kind", BOUND)
@torch.no_grad()
def test_outputs_and_gradients_stay_within_a_bound(backbones: Backbones, shards: Path, kind: str) -> None:
    made = recipe(run_of(backbones, shards, {}, lora={}))
    batch = make_batch(made.encoder, [0, 1], Task.EDIT)
    full = made.model.vlm.prefix(batch.prompts, batch.images)
    layer = made.model.vlm.language_model.layers[0].mlp.down_proj
    pack(made.model.vlm.vlm, kind)
    packed = made.model.vlm.prefix(batch.prompts, batch.images)
    for ours, theirs in zip((*packed.keys, *packed.values), (*full.keys, *full.values), strict=True):
        assert 0 < float((ours - theirs).norm() / theirs.norm()) < BOUND[kind]
    assert not quantizable(made.model.vlm.vlm)
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
    gradients = []
    with torch.enable_grad():
        for one in (layer, QuantizedLinear(layer, kind)):
            (gradient,) = torch.autograd.grad(one(x).square().sum(), x)
            gradients.append(gradient)
    assert 0 < float((gradients[0] - gradients[1]).norm() / gradients[0].norm()) < 2 * BOUND[kind]


def test_a_stage_on_packed_weights_learns_adapters_and_resumes_equal(
    trained: tuple[StageRun, Path], tmp_path: Path
) -> None:
    run, checkpoint = trained
    manifest, weights = read_manifest(checkpoint), load_weights(checkpoint)
    assert {n.rpartition(".lora_")[0] for n in weights if is_adapter(n)}
    assert not any(n.startswith(("dit.", "bridge.pathway.", "vlm.")) and not is_adapter(n) for n in weights)
    assert all(weights[n].any() for n in weights if n.endswith("lora_B.weight"))
    assert {f: v for f, v in manifest.settings.items() if f.startswith("memory.quantize")} == {
        f"memory.quantize.{part}": kind for part, kind in ALL.items()
    }
    resumed = load_weights(train(run, with_checkpoint(tmp_path / "again", checkpoint, 1)))
    assert differing(resumed, weights) == []


@torch.no_grad()
def test_adapters_in_bfloat16_merge_into_what_they_drew(trained: tuple[StageRun, Path]) -> None:
    run, checkpoint = trained
    made, plain = load_trained(run, checkpoint), velocity(recipe(run))
    assert {p.dtype for name, p in made.model.named_parameters() if is_adapter(name)} == {torch.bfloat16}
    learnt = velocity(made)
    merge(made.model)
    # Rounding of weights in bfloat16, far below what was learnt.
    assert (velocity(made) - learnt).norm() < 0.1 * (learnt - plain).norm()


@pytest.mark.parametrize("kind", BOUND)
def test_adapters_on_packed_weights_compile_without_a_break(kind: str) -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(64, 96)]).to(torch.bfloat16).requires_grad_(False)
    config = LoraConfig(r=4, target_modules="0", init_lora_weights=False)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inject_adapter_in_model(config, model.blocks)
    pack(model, kind)
    layer: Any = model.blocks[0]
    assert isinstance(layer.base_layer, QuantizedLinear)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16).requires_grad_()
    learns = [x, *(p for p in layer.parameters() if p.requires_grad)]
    found = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        y = call(x)
        found.append((y, *torch.autograd.grad(y.float().square().sum(), learns)))
    assert len(found[0]) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_a_resume_names_other_bits(
    trained: tuple[StageRun, Path], shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, checkpoint = trained
    again = with_checkpoint(tmp_path / "again", checkpoint, 1)
    other = load_weights(train(run_of(run.backbones, shards, {**ALL, "vlm": "int8"}), again))
    assert "changed since that checkpoint: memory.quantize.vlm: nf4 -> int8" in capsys.readouterr().out
    assert differing(load_weights(checkpoint), other)


def test_the_next_stage_packs_weights_that_an_earlier_one_trained(
    backbones: Backbones, shards: Path, tmp_path: Path
) -> None:
    """They come from the start in full, are packed after it, and are carried in full."""
    whole = run_of(backbones, shards, {}, lora={}, stage={"steps": 1})
    first = train(whole, tmp_path / "first")
    after = run_of(backbones, shards, ALL, stage={"steps": 1, "start": str(first)})
    last = train(after, tmp_path / "second")
    ours, theirs = load_weights(last), load_weights(first)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs if name.startswith(("dit.", "bridge.pathway.")))
    assert any(name.startswith("dit.") for name in theirs)
    assert torch.isfinite(velocity(load_trained(after, last))).all()


@pytest.mark.slow
def test_an_export_has_full_weights(trained: tuple[StageRun, Path], tmp_path: Path) -> None:
    run, checkpoint = trained
    lines = export(find(checkpoint), tmp_path / "export", "float32", False, True, ema=False)
    assert any("max abs difference" in line for line in lines)
    merged = load_trained(run, checkpoint).model
    assert not any(isinstance(module, QuantizedLinear) for module in merged.modules())


# Of the recipes that tune the VLM: a stage, and what is packed.
TUNED = {
    "ross": ("tune", "{vision: nf4, llm: nf4, teacher: int8}"),
    "uae": ("reward", "{vision: nf4, llm: int8, generator: nf4, dit: int8, reward: int8}"),
}
OF_ROSS = "recipe.target={kind: features, encoder: assets/shapes/encoders/dino}"
FLOW = "stages.reward.objective={kind: flow_grpo, window: 1, first: 0}"
OF_UAE = (
    "recipe.generator.steps=1",
    "recipe.max_length=16",
    "stages.reward.objective={kind: unified_grpo, group: 3, temperature: 2.0, beta: 0.01}",
)


def tuned(name: str, shards: str, packed: str, *changes: str) -> StageRun:
    stage = TUNED[name][0]
    own = (
        [OF_ROSS, "recipe.head={kind: denoiser, depth: 1, width: 32, heads: 2, repeats: 1}"]
        if name == "ross"
        else OF_UAE
    )
    few = [
        f"stages.{stage}.{field}"
        for field in (
            "steps=2",
            "global_batch=4",
            "resolution=32",
            "optimizer.lr=0.01",
            "optimizer.warmup=0",
            "optimizer.decay=0",
        )
    ]
    memory = f"memory={{micro_batch: 2, reference_resolution: 32, quantize: {packed}}}"
    logging = "logging={every: 1, samples_every: 100, checkpoint_every: 1, keep_checkpoints: 9, wandb: disabled}"
    chosen = [*own, *few, memory, logging, "recipe.lora={llm: {rank: 2}}", f"data={{shards: {shards}}}"]
    return load_curriculum(SHAPES / f"{name}.yaml", [*chosen, "sampling.prompts=[]", "threads=1", *changes]).stage_run(
        stage
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNED)
def test_a_vlm_learns_by_adapters_on_packed_weights_resumes_equal_and_is_exported_whole(
    name: str, tmp_path: Path
) -> None:
    # Text-to-image records serve captions.
    write(tmp_path / "shards", all_tasks({Task.UNDERSTANDING: 8, Task.T2I: 8}))
    run = tuned(name, str(tmp_path / "shards"), TUNED[name][1])
    checkpoint = train(run, tmp_path / "stage")
    weights = load_weights(checkpoint)
    adapters = {n for n in weights if is_adapter(n)}
    assert all(weights[n].any() for n in adapters if n.endswith("lora_B.weight"))
    assert all(n.startswith(("vlm.model.visual.merger.", "head.")) for n in weights.keys() - adapters)
    resumed = load_weights(train(run, with_checkpoint(tmp_path / "again", checkpoint, 1)))
    assert differing(resumed, weights) == []
    export(find(checkpoint), tmp_path / "export", "float32", False, True, ema=False)
    exported, base = (load_vlm(f, torch.float32)[0] for f in (tmp_path / "export", run.backbones.vlm))
    a = next(n for n in adapters if n.endswith("down_proj.lora_A.weight"))
    layer = a.replace("lora_A.", "").removeprefix("vlm.")
    learnt = weights[a.replace("lora_A", "lora_B")] @ weights[a]
    assert learnt.abs().max() > 1e-5
    assert torch.allclose(exported.get_parameter(layer), base.get_parameter(layer) + learnt, atol=1e-6)
    assert torch.equal(
        exported.model.visual.blocks[0].mlp.down_proj.weight, base.model.visual.blocks[0].mlp.down_proj.weight
    )


@pytest.mark.parametrize("name", TUNED)
@torch.no_grad()
def test_all_frozen_parts_of_the_other_recipes_are_packed_as_planned(name: str) -> None:
    # Encoders are in float32 nonetheless.
    run = tuned(name, "shards", TUNED[name][1], "backbones.dtype=bfloat16")
    made = recipe(run)
    encoder: Any = made.model.get_submodule("teacher" if name == "ross" else "encoders.reward")
    made.model.freeze_all_but(run.stage.trains)
    images = torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    full = encoder.embed(images)
    quantize(run, made.model)
    for paths in run.recipe.quantizable.values():
        for path in paths:
            assert not quantizable(made.model.get_submodule(path))
            assert any(isinstance(part, QuantizedLinear) for part in made.model.get_submodule(path).modules())
    assert 0 < float((encoder.embed(images) - full).norm() / full.norm()) < BOUND["int8"]
    layers = [part for part in made.model.modules() if isinstance(part, QuantizedLinear)]
    real = sum(one.packed.nbytes + one.scales.nbytes for one in layers)
    real += sum(p.nbytes for p in made.model.parameters() if not p.requires_grad)
    rank = RankWorkload(run, ask([Item("parameters", run)])[0], Degrees(1, 1, 1), 1, 1)
    assert states(rank)["frozen weights"] == pytest.approx(real, rel=0.01)
    learns = sum(p.numel() for p in made.model.parameters() if p.requires_grad)
    # The head of features is planned with as many channels as that of pixels.
    assert name == "ross" or stored_bytes(rank.model, run, []) == 12 * learns
    assert rank.model["parts"]["teacher" if name == "ross" else "encoders"] > 0


# ------------------------------------------------------------------------------------------------------------ configs
@pytest.mark.parametrize(
    ("quantize", "changes", "message"),
    [
        ({"vae": "nf4"}, {}, "memory.quantize: vae is not possible; valid: vlm, pathway, dit"),
        ({"vlm": "int3"}, {}, "Input should be 'int8' or 'nf4'"),
        ({"dit": "nf4"}, {"lora": {}}, r"memory\.quantize\.dit: all weights of dit are trained.*recipe\.lora\.dit"),
        ({"pathway": "nf4"}, {"lora": {}, "stage": {"trains": ["position_mlp"]}}, "all weights of pathway are trained"),
        (
            {"dit": "nf4"},
            {"parallel": {"engine": "zero3", "ranks": 2}},
            "engine zero3 cannot shard dit .*parallel.engine",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(
    backbones: Backbones, quantize: object, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run_of(backbones, Path("shards"), quantize, **changes)


@pytest.mark.parametrize(
    ("name", "packed", "changes", "message"),
    [
        ("ross", "{vae: nf4}", (), "memory.quantize: vae is not possible; .*valid: vision, llm, teacher"),
        ("ross", "{teacher: nf4}", ("recipe.target=pixels",), "teacher is not possible; .*valid: vision, llm"),
        (
            "ross",
            "{llm: nf4}",
            ("recipe.lora={}",),
            "all weights of llm are trained, .*give it adapters, recipe.lora.llm",
        ),
        ("ross", "{vision: nf4}", ("parallel={engine: zero3, ranks: 2}",), "engine zero3 cannot shard vision"),
        ("uae", "{reward: nf4}", ("recipe.reward={encoder: pixels}",), "valid: vision, llm, generator, dit"),
        (
            "uae",
            "{dit: nf4}",
            (FLOW, "stages.reward.trains=[dit]"),
            "all weights of dit are trained.*give it adapters, recipe.lora.dit, or remove memory.quantize.dit",
        ),
        (
            "uae",
            "{dit: nf4}",
            (FLOW, "stages.reward.trains=[dit]", "recipe.lora={dit: {rank: 2}}", "parallel={engine: zero3, ranks: 2}"),
            "engine zero3 cannot shard dit",
        ),
        ("uae", "{llm: nf4}", ("parallel={engine: zero3, ranks: 2}",), "engine zero3 cannot shard llm"),
    ],
)
def test_what_cannot_be_packed_in_other_recipes_is_refused(
    name: str, packed: str, changes: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        tuned(name, "shards", packed, *changes)
    if name == "uae" and packed == "{llm: nf4}":
        # Whole on every rank.
        tuned(name, "shards", "{generator: nf4, dit: nf4, reward: int8}", *changes)


def test_a_missing_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(BackboneError, match=r"memory.quantize needs bitsandbytes.*wemmu\[quantize\]"):
        pack(torch.nn.ModuleList([torch.nn.Linear(2, 2)]), "nf4")
