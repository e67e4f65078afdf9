"""Adapters learn in place of the weights they adapt: nothing else moves, checkpoints hold them alone, they merge."""

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import SanaTransformer2DModel
from diffusers.pipelines.sana.pipeline_sana import SanaPipeline
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

from tests.checkpoints import differing
from tests.models.world import make_batch
from tests.parallel.cases import RossCase
from tests.training import test_uae_paths as paths
from tests.training import test_uae_resume as resumed
from tests.training.runs import STAGE, make_run, train
from tests.training.test_uae import CONFIG as UAE
from tests.training.test_uae import batch_of, make
from tools.convert_ckpt import export, find, main
from tools.export.adapters import write_adapters
from wemmu.backbones import weights as loading
from wemmu.backbones.weights import load_vlm
from wemmu.checkpoint import store
from wemmu.checkpoint.adapters import is_adapter
from wemmu.checkpoint.collective import CheckpointError
from wemmu.checkpoint.manifest import read_manifest
from wemmu.checkpoint.stored import StoredTensors
from wemmu.config import StageRun, load_curriculum
from wemmu.config.lora import LoRA
from wemmu.config.schema import Backbones
from wemmu.parallel.single import SingleEngine
from wemmu.planning.ask import Item, ask
from wemmu.planning.layout import Degrees, RankWorkload, states
from wemmu.planning.layout import checkpoint as stored_bytes
from wemmu.recipes.lora import merge
from wemmu.recipes.recipe import Recipe, recipe
from wemmu.recipes.wemmu.config import States
from wemmu.training.build import build, load_trained

LORA = {"pathway": {"rank": 2}, "dit": {"rank": 3, "alpha": 12.0, "targets": ["attn2.to_q", "*.0.attn1.*"]}}
NEW = ("bridge.vae_branch.", "bridge.position_mlp.")


def run_of(backbones: Backbones, shards: Path, lora: object, **stage: object) -> StageRun:
    optimizer = {"lr": 1e-2, "module_lr": {"dit": 1e-2}, "ema_decay": 0.5}
    changed = {**STAGE, "steps": 4, "optimizer": optimizer, **stage}
    return make_run(
        backbones, shards, stages=[changed], recipe={"kind": "wemmu", "bridge": {"position_table": 8}, "lora": lora}
    )


def with_checkpoint(folder: Path, beside: Path, step: int) -> Path:
    """The folder of a stage that has only the checkpoint of `step`, which lies beside another one."""
    half = beside.with_name(store.directory_name(step))
    shutil.copytree(half, folder / "checkpoints" / half.name)
    return folder


@pytest.fixture(scope="module")
def trained(backbones: Backbones, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StageRun, Path]:
    """A stage that trains all parts, two of them by adapters, and its last checkpoint."""
    run = run_of(backbones, shards, LORA)
    return run, train(run, tmp_path_factory.mktemp("lora") / "stage")


def load_weights(checkpoint: Path, ema: bool = False) -> dict[str, Tensor]:
    stored = StoredTensors(checkpoint, ema)
    return {name: stored.read(name) for name in stored.manifest.tensors}


@torch.no_grad()
def velocity(made: Recipe) -> Tensor:
    batch = make_batch(made.encoder, [0, 1])
    losses = made.loss(batch, 0)
    return losses.values


def test_a_checkpoint_holds_the_adapters_and_not_what_they_adapt(trained: tuple[StageRun, Path]) -> None:
    run, checkpoint = trained
    manifest = read_manifest(checkpoint)
    others = {name for name in manifest.tensors if not is_adapter(name)}
    assert others
    assert all(name.startswith(NEW) for name in others)
    assert set(manifest.trained) == manifest.tensors.keys()
    assert manifest.ema
    assert manifest.adapters == {"bridge.pathway.": 1.0, "dit.": 4.0}
    assert manifest.copied == {"bridge.pathway.": "vlm"}
    assert manifest.frozen.keys() == {"vlm", "vae", "dit"}
    layers = {name.rpartition(".lora_")[0] for name in manifest.tensors if name.startswith("dit.")}
    linear = {"to_q", "to_k", "to_v", "to_out.0"}
    expected = {f"dit.transformer_blocks.0.attn1.{name}" for name in linear}
    blocks = len(load_trained(run, checkpoint).model.dit.transformer_blocks)
    assert layers == expected | {f"dit.transformer_blocks.{i}.attn2.to_q" for i in range(blocks)}
    # B began at zero and has learnt; A is what the seed says or has moved.
    weights = load_weights(checkpoint)
    assert all(weights[name].any() for name in weights if name.endswith("lora_B.weight"))


def test_nothing_moves_but_adapters_and_new_parts(trained: tuple[StageRun, Path]) -> None:
    run, checkpoint = trained
    before, after = recipe(run).model, load_trained(run, checkpoint).model
    moved = {name for name, p in after.named_parameters() if not torch.equal(p, before.get_parameter(name))}
    assert moved == set(read_manifest(checkpoint).tensors)
    plain = recipe(run.changed({"recipe.lora": {}})).model
    names = [name for name, _ in after.named_parameters()]
    assert [name for name in names if not is_adapter(name)] == [name for name, _ in plain.named_parameters()]
    assert type(after.dit) is type(plain.dit)


def test_a_resumed_run_is_the_undisturbed_one(trained: tuple[StageRun, Path], tmp_path: Path) -> None:
    run, checkpoint = trained
    resumed = train(run, with_checkpoint(tmp_path / "again", checkpoint, 2))
    assert resumed.name == checkpoint.name
    for ema in (False, True):
        assert differing(load_weights(resumed, ema), load_weights(checkpoint, ema)) == []


def test_the_next_stage_goes_on_with_the_adapters_or_merges_them(
    trained: tuple[StageRun, Path], shards: Path, tmp_path: Path
) -> None:
    run, checkpoint = trained
    weights = load_weights(checkpoint)
    expected = velocity(load_trained(run, checkpoint, ema=False))
    frozen = {"lr": 1e-12, "module_lr": {"dit": 1e-12}}
    for name, lora in (("goes on", LORA), ("merged", {}), ("half", {"dit": LORA["dit"]})):
        after = run_of(run.backbones, shards, lora, steps=1, start=str(checkpoint), optimizer=frozen)
        last = train(after, tmp_path / name.replace(" ", "_"))
        manifest = read_manifest(last)
        assert torch.allclose(velocity(load_trained(after, last)), expected, atol=1e-5), name
        assert any(name.startswith("dit.") for name in manifest.tensors)
        if lora == LORA:
            found = load_weights(last)
            assert all(torch.allclose(found[n], weights[n], atol=1e-9) for n in weights)
        assert manifest.adapters.keys() == {
            p for p, m in (("bridge.pathway.", "pathway"), ("dit.", "dit")) if m in lora
        }
        assert bool(manifest.copied) == ("pathway" in lora)


def test_other_adapters_are_refused_with_the_way_out(
    trained: tuple[StageRun, Path], shards: Path, tmp_path: Path
) -> None:
    run, checkpoint = trained
    for changed, said in (
        (
            {**LORA["dit"], "rank": 2, "alpha": 8.0},
            "rank 3, here 2. .*set rank 3 and alpha / rank 4 for the same layers",
        ),
        ({"rank": 3, "alpha": 12.0}, r"it has no dit\.transformer_blocks.* and .* more. "),
        ({**LORA["dit"], "targets": ["attn2.to_q"]}, r"this stage has no dit\..*attn1.* and .* more. "),
        ({**LORA["dit"], "alpha": 3.0}, "alpha / rank 4, here 1. "),
    ):
        other = run_of(run.backbones, shards, {**LORA, "dit": changed}, start=str(checkpoint))
        words = rf"other adapters \(LoRA\) of dit\.\* than recipe.lora: {said}.*merge them with `wemmu export`"
        with pytest.raises(CheckpointError, match=words):
            train(other, tmp_path / f"other{len(list(tmp_path.iterdir()))}")


def test_adapters_of_a_frozen_module_rest_and_are_carried(
    trained: tuple[StageRun, Path], shards: Path, tmp_path: Path
) -> None:
    run, checkpoint = trained
    after = run_of(
        run.backbones, shards, LORA, steps=1, start=str(checkpoint), trains=["position_mlp", "pathway"],
        optimizer={"lr": 1e-2},
    )  # fmt: skip
    last = train(after, tmp_path / "resting")
    manifest = read_manifest(last)
    assert manifest.adapters == {"bridge.pathway.": 1.0, "dit.": 4.0}
    assert differing(load_weights(last), load_weights(checkpoint)) == manifest.trained


@pytest.mark.slow
def test_an_export_holds_merged_weights_and_draws_what_the_adapters_draw(
    trained: tuple[StageRun, Path], tmp_path: Path
) -> None:
    run, checkpoint = trained
    lines = export(find(checkpoint), tmp_path / "export", "float32", False, True, ema=False)
    assert any("max abs difference" in line for line in lines)
    weights = load_weights(checkpoint)
    base = recipe(run).model
    for file, word, scale in (("transformer", "dit", 4.0), ("bridge", "bridge", 1.0)):
        exported = load_file(tmp_path / "export" / file / "diffusion_pytorch_model.safetensors")
        assert not any(map(is_adapter, exported))
        a = next(n for n in weights if n.startswith(f"{word}.") and n.endswith("lora_A.weight"))
        name = a.replace("lora_A.", "")
        delta = scale * weights[a.replace("lora_A", "lora_B")] @ weights[a]
        assert torch.allclose(exported[name.removeprefix(f"{word}.")], base.get_parameter(name) + delta, atol=1e-6)
        assert delta.abs().max() > 1e-5


@torch.no_grad()
def test_stock_classes_load_the_adapters_as_folders_of_peft(trained: tuple[StageRun, Path], tmp_path: Path) -> None:
    run, checkpoint = trained
    made = load_trained(run, checkpoint, ema=False)
    merge(made.model)
    main(checkpoint, adapters=tmp_path / "out", ema=False)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, generator=generator) for shape in ((2, 32, 2, 2), (2, 4, made.model.caption_channels)))
    asked = {"encoder_hidden_states": y, "timestep": torch.tensor([500.0, 100.0]), "return_dict": False}
    expected = made.model.dit(x, **asked)[0]

    def dit() -> SanaTransformer2DModel:
        return SanaTransformer2DModel.from_pretrained(run.backbones.dit)

    plain, peft, lora = dit(), PeftModel.from_pretrained(dit(), tmp_path / "out" / "dit"), dit()
    SanaPipeline(None, None, None, lora, None).load_lora_weights(tmp_path / "out" / "dit")
    for model in (peft, lora):
        assert torch.allclose(model(x, **asked)[0], expected, atol=1e-5)
    assert not torch.allclose(plain(x, **asked)[0], expected, atol=1e-3)
    vlm: Any = load_vlm(run.backbones.vlm, torch.float32)[0]
    copied = PeftModel.from_pretrained(vlm.model.language_model, tmp_path / "out" / "pathway").merge_and_unload()
    for name, parameter in made.model.bridge.pathway.layers.named_parameters():
        assert torch.allclose(copied.layers.get_parameter(name), parameter, atol=1e-6), name


def test_a_plan_counts_moments_and_checkpoints_of_adapters_alone(trained: tuple[StageRun, Path]) -> None:
    run, checkpoint = trained
    manifest = read_manifest(checkpoint)
    numbers = sum(math.prod(shape) for shape in manifest.tensors.values())
    (model,) = ask([Item("parameters", run)])
    rank = RankWorkload(run, model, Degrees(1, 1, 1), 1, 1)
    held = states(rank)
    assert held["moments"] == 8 * numbers
    assert held["moving average"] == 4 * numbers
    everything = sum(p.numel() for p in recipe(run).model.parameters())
    assert held["frozen weights"] == 4 * (everything - numbers)
    assert stored_bytes(model, run, []) == 16 * numbers


# ------------------------------------------------------------------------------------------------------------ configs
@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"vae_branch": {}}, "no adapters for vae_branch; valid: pathway, dit"),
        ({"dit": {"rank": 0}}, "greater than 0"),
        ({"dit": {}, "pathway": {}}, "no stage trains dit, so its adapters would stay zero"),
    ],
)
def test_a_config_of_adapters_that_cannot_be_is_refused(backbones: Backbones, lora: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_of(backbones, Path("shards"), lora, trains=["pathway"])
    if message.startswith("no stage"):
        run_of(backbones, Path("shards"), lora, trains=["pathway"], start="a/checkpoint/with/them")


def test_hybrid_says_that_it_has_no_adapters(backbones: Backbones) -> None:
    with pytest.raises(ValueError, match="valid engines: single, zero3"):
        make_run(
            backbones, Path("shards"), parallel={"engine": "hybrid", "ranks": 2, "tp": 2},
            recipe={"kind": "wemmu", "bridge": {"position_table": 8}, "lora": {"dit": {}}},
        )  # fmt: skip


def test_an_unknown_target_names_the_layers_there_are(backbones: Backbones) -> None:
    run = run_of(backbones, Path("shards"), {"pathway": {"targets": ["q_proj", "to_q"]}})
    with pytest.raises(
        ValueError, match=r"recipe\.lora\.pathway\.targets: no linear layer matches 'to_q'; valid: .*q_proj"
    ):
        recipe(run)


def test_a_rank_above_that_of_all_layers_is_refused(backbones: Backbones) -> None:
    """Such adapters are larger than the layers: a typing error, which took all memory."""
    run = run_of(backbones, Path("shards"), {"pathway": {"rank": 10_000}})
    with pytest.raises(ValueError, match=r"recipe\.lora\.pathway\.rank 10000 is more than the rank of its layers"):
        recipe(run)


ODD = LoRA(targets=("nope",))
LACKING = {
    "pathway": ({"recipe.lora": {"pathway": ODD}}, r"recipe\.lora\.pathway\.targets: .*'nope'; valid: "),
    "dit": ({"recipe.lora": {"dit": ODD}}, r"recipe\.lora\.dit\.targets: .*'nope'; valid: .*attn2"),
    "states": ({"recipe.bridge.states": States(layers=99)}, r"states\.layers = 99, but the VLM has \d+ layers"),
    "ross": ({"recipe.lora": {"llm": ODD}}, r"recipe\.lora\.llm\.targets: .*'nope'; valid: .*q_proj"),
    "uae": ({"recipe.lora": {"dit": ODD}}, r"recipe\.lora\.dit\.targets: .*'nope'; valid: .*attn2"),
}


@pytest.mark.parametrize("what", LACKING)
def test_layers_that_a_backbone_lacks_are_refused_before_weights_are_read(
    backbones: Backbones, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    run = make_run(backbones, Path("shards"))
    if what == "ross":
        run = RossCase().run
    elif what == "uae":
        run = load_curriculum(UAE, [paths.FLOW % "", "stages.reward.trains=[dit]"]).stage_run("reward")
    changes, words = LACKING[what]

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights are read")

    monkeypatch.setattr(loading, "load_strict", read)
    with pytest.raises(ValueError, match=words):
        build(run.changed({"backbones": backbones, **changes}))


# ---------------------------------------------------------------------------------------------------------------- UAE
def test_a_policy_with_adapters_is_its_own_reference() -> None:
    """The penalty is on, and there is no second language model: the reference is the policy without its adapters."""
    made = make("recipe.lora={llm: {rank: 2}}", beta=0.05)
    model = made.model
    assert model.reference is None
    batch = batch_of(made)
    plain = model.states(batch.prompts, batch.images)
    engine = SingleEngine(model, made.loss, made._run.changed({"stage.optimizer.lr": 1e-2, "stage.global_batch": 3}))
    kl = []
    for step in range(2):
        (losses,) = engine.accumulate(made.prepare([batch], step).batches, step)
        kl.append(float(losses.parts["kl"].mean()))
        engine.step(1.0)
    assert kl[0] == 0
    assert kl[1] > 0
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {name for name, _ in model.named_parameters() if is_adapter(name)}
    with torch.no_grad():
        assert torch.equal(model.states(batch.prompts, batch.images, reference=True), plain)
        assert not torch.allclose(model.states(batch.prompts, batch.images), plain)


def test_the_reference_of_a_later_stage_has_the_adapters_it_began_with(tmp_path: Path) -> None:
    first = make("recipe.lora={llm: {rank: 2}}", beta=0.05)
    for name, p in first.model.named_parameters():
        if name.endswith("lora_B.weight"):
            torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    engine = SingleEngine(first.model, first.loss, first._run.changed({"stage.global_batch": 3}))
    origin = store.Origin(
        "cold", 0, 64, {name: report.sha256 for name, report in first.reports.items()},
        adapters={"vlm.model.language_model.": 1.0},
    )  # fmt: skip
    start = store.save(tmp_path, replace(engine.state(), steps=1), {}, origin)
    batch = batch_of(first)
    with torch.no_grad():
        expected = first.model.states(batch.prompts, batch.images)
    write_adapters(first._run, start, tmp_path, ema=False)
    vlm: Any = load_vlm(first._run.backbones.vlm, torch.float32)[0]
    stock = PeftModel.from_pretrained(vlm, tmp_path / "llm")
    ids = batch.prompts.input_ids[:, -3:]
    with torch.no_grad():
        assert torch.allclose(stock(input_ids=ids).logits, first.model.vlm(input_ids=ids).logits, atol=1e-5)
    later = make("recipe.lora={llm: {rank: 2}}", f"stages.reward.start={start}", beta=0.05)
    with torch.no_grad():
        assert torch.equal(later.model.states(batch.prompts, batch.images, reference=True), expected)
        assert not torch.allclose(later.model.states(batch.prompts, batch.images), expected)
    assert not any("reference" in name for name, _ in later.model.named_parameters())
    # Of another rank, or of other weights: said before anything is filled.
    with pytest.raises(CheckpointError, match=r"of vlm\.model\.language_model\.\* than recipe.lora: rank 2, here 3"):
        make("recipe.lora={llm: {rank: 3}}", f"stages.reward.start={start}", beta=0.05)


def test_a_dit_with_adapters_is_its_own_reference() -> None:
    """GRPO over paths with the penalty: no copy of the DiT, nothing but its adapters learns."""
    made = paths.make(
        paths.FLOW % "updates: 2, beta: 0.1", "stages.reward.optimizer.lr=0.001", "recipe.lora={dit: {rank: 2}}"
    )
    model, (batch,) = made.model, paths.batches(made, 2)
    assert model.reference is None
    assert model.sharded == ("vlm", "generator.dit")
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learns == {name for name, _ in model.named_parameters() if is_adapter(name)}
    assert all(name.startswith("generator.dit.") for name in learns)
    plain = paths.make(paths.FLOW % "updates: 2, beta: 0.1")
    engine = SingleEngine(model, made.loss, made._run.changed({"stage.global_batch": 2}))
    seen = []
    for step in range(3):
        prepared = made.prepare([batch], step).batches
        (losses,) = engine.accumulate(prepared, step)
        engine.step(1.0)
        seen.append((losses.parts["kl"], prepared[0].paths.means))
    assert not seen[0][0].any()
    assert (seen[1][0] > 0).all()
    # What the reference computes is what the DiT without adapters does, also when these have learnt.
    with torch.no_grad():
        steps = plain.loss.transitions(prepared[0].paths)
    assert torch.allclose(seen[2][1], torch.stack([step.mean for step in steps], 1), atol=1e-6)


@pytest.mark.slow
def test_the_dit_of_a_generator_learns_by_adapters_resumes_equal_and_is_exported_whole(tmp_path: Path) -> None:
    run = resumed.run_of(tmp_path, "dit").changed({"recipe.lora": {"dit": LoRA(rank=2, alpha=4.0)}})
    checkpoint = train(run, tmp_path / "stage")
    manifest, weights = read_manifest(checkpoint), load_weights(checkpoint)
    assert all(map(is_adapter, weights))
    assert manifest.adapters == {"generator.dit.": 2.0}
    assert all(weights[name].any() for name in weights if name.endswith("lora_B.weight"))
    again = load_weights(train(run, with_checkpoint(tmp_path / "again", checkpoint, 4)))
    assert differing(again, weights) == []
    export(find(checkpoint), tmp_path / "export", "float32", False, True, ema=False)
    exported = load_file(tmp_path / "export" / "transformer" / "diffusion_pytorch_model.safetensors")
    base = recipe(run).model.generator.dit
    a = {name: n for n in weights if (name := n.replace("lora_A.", "").removeprefix("generator.dit.")) in exported}
    assert len(a) == len(weights) / 2
    for name, tensor in exported.items():
        expected = base.get_parameter(name.replace(".weight", ".base_layer.weight") if name in a else name)
        if name in a:
            expected = expected + 2 * weights[a[name].replace("lora_A", "lora_B")] @ weights[a[name]]
        assert torch.allclose(tensor, expected, atol=1e-6), name
    main(checkpoint, adapters=tmp_path / "out", ema=False)
    merged = SanaTransformer2DModel.from_pretrained(tmp_path / "export" / "transformer")
    plain = SanaTransformer2DModel.from_pretrained(run.backbones.dit)
    plain.load_state_dict(
        {name.replace(".base_layer.", "."): p for name, p in base.named_parameters() if ".lora_" not in name}
    )
    peft = PeftModel.from_pretrained(plain, tmp_path / "out" / "dit").merge_and_unload()
    for name, parameter in merged.named_parameters():
        assert torch.allclose(peft.get_parameter(name), parameter, atol=1e-6), name
    (model,) = ask([Item("parameters", run)])
    numbers = sum(tensor.numel() for tensor in weights.values())
    rank = RankWorkload(run, model, Degrees(1, 1, 1), 1, 1)
    assert states(rank)["moments"] == 8 * numbers
    assert stored_bytes(model, run, []) == 12 * numbers
