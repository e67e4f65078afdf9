"""Folders in the very layout of the published ones load, train, and are exported for the stock libraries."""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderDC, DiffusionPipeline, DPMSolverMultistepScheduler, SanaTransformer2DModel
from safetensors import safe_open
from torch import Tensor
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

from tests.checkpoints import differing
from tests.export.conftest import OVERRIDES, REPOSITORY
from tests.models.world import make_batch, make_model
from tests.parallel.cases import Case, single
from tests.published import replicas
from tests.training.runs import STAGE_RUN
from tools.convert_ckpt import main as convert
from tools.export.skeleton import skeleton
from tools.export.stored import DIFFUSERS_FILE, check_names, published
from wemmu.backbones.versions import portable
from wemmu.backbones.weights import load_dit, load_vlm
from wemmu.checkpoint import store
from wemmu.checkpoint.manifest import Origin
from wemmu.config import dump, load_curriculum
from wemmu.config.schema import Backbones
from wemmu.parallel.single import SingleEngine
from wemmu.prompts import PromptEncoder
from wemmu.published.check import problems
from wemmu.published.identity import identity
from wemmu.published.layout import BackboneError
from wemmu.recipes.wemmu.config import Bridge, WeMMU
from wemmu.shapes.backbones import DIT_CONFIG, VAE_CONFIG

ASSETS = REPOSITORY / "assets/shapes/vlm"
# Sana-1.5 norms queries and keys; the 0.6B has other depths, heads and widths.
SANAS: dict[str, dict[str, Any]] = {
    "Sana 1.6B": {"num_layers": 2},
    "Sana-1.5": {"num_layers": 3, "qk_norm": "rms_norm_across_heads"},
    "Sana 0.6B": {"num_layers": 4, "num_attention_heads": 6, "num_cross_attention_heads": 3,
                  "cross_attention_head_dim": 64, "cross_attention_dim": 192, "caption_channels": 96},
}  # fmt: skip


def flat_config(vlm: Any) -> dict[str, Any]:
    """Return a VLM's config in the form that Qwen2.5-VL is published in: the language model's fields at the top."""
    config = json.loads(vlm.config.to_json_string(use_diff=False))
    text = portable(config.pop("text_config"))
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rope_theta", "tie_word_embeddings", "hidden_act",
        "initializer_range", "rms_norm_eps", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    tokens = {name: value for name, value in config.items() if name.endswith("_token_id")}
    rope = {"type": "mrope", "mrope_section": text["rope_scaling"]["mrope_section"]}
    flat = tokens | {name: text[name] for name in kept} | {"rope_scaling": rope}
    flat |= {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    return flat | {"vision_config": config["vision_config"], "use_sliding_window": False}


def narrow(model: torch.nn.Module) -> Any:
    """Round a model's weights as its file does."""
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@dataclass(frozen=True)
class Replica:
    backbones: Backbones
    vlm: Any
    dit: SanaTransformer2DModel
    vae: AutoencoderDC


@pytest.fixture(scope="module")
def replica(backbones: Backbones, tmp_path_factory: pytest.TempPathFactory) -> Replica:
    """Qwen2.5-VL and Sana at the miniature's size, in the hub's cache, with the very numbers that they were given."""
    root = tmp_path_factory.mktemp("hub")
    vlm = narrow(Qwen2_5_VLForConditionalGeneration.from_pretrained(backbones.vlm))
    torch.manual_seed(7)
    dit, vae = SanaTransformer2DModel(**DIT_CONFIG), AutoencoderDC(**VAE_CONFIG, scaling_factor=0.41407)
    replicas.qwen2_5_vl(root / "vlm", vlm, flat_config(vlm), backbones.vlm)
    replicas.sana(root / "sana", dit, vae)
    hub = [
        replicas.as_hub_cache(root / "vlm", root / "cache", "Qwen/Qwen2.5-VL-3B-Instruct"),
        replicas.as_hub_cache(root / "sana", root / "cache", "Efficient-Large-Model/Sana_1600M_1024px_diffusers"),
    ]
    return Replica(Backbones(vlm=hub[0], sana=hub[1]), vlm.eval(), dit, vae)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("vlm", "sana"),
    [
        ("Qwen2.5-VL-3B-Instruct", "Sana_1600M_1024px_diffusers"),
        ("Qwen2.5-VL-7B-Instruct", "Sana_600M_1024px_diffusers"),
        ("Qwen3-VL-2B-Instruct", "SANA1.5_1.6B_1024px_diffusers"),
        ("Qwen3-VL-4B-Instruct", "SANA1.5_4.8B_1024px_diffusers"),
    ],
)
def test_every_name_and_shape_of_the_published_size_is_accepted(tmp_path: Path, vlm: str, sana: str):
    directories = [replicas.full_size(tmp_path, name, ASSETS) for name in (vlm, f"{sana}/transformer")]
    backbones = Backbones(vlm=directories[0], sana=directories[1], dtype="bfloat16")
    assert problems(backbones, WeMMU.backbones) == []
    run = STAGE_RUN.model_copy(update={"backbones": backbones, "recipe": WeMMU(bridge=Bridge())})
    model = skeleton(run)
    check_names(model.dit, published(backbones.dit, DIFFUSERS_FILE), "dit")
    check_names(model.vae.vae, published(backbones.vae, DIFFUSERS_FILE), "vae")
    # And one that is another is not.
    config = directories[0] / "config.json"
    changed = json.loads(config.read_text())
    (changed.get("text_config") or changed)["intermediate_size"] += 8
    config.write_text(json.dumps(changed))
    with pytest.raises(
        BackboneError, match=r"first differences: model\.language_model\.layers\.0\.mlp\.down_proj\.weight"
    ):
        skeleton(run)


@torch.no_grad()
def test_what_is_loaded_are_the_published_numbers_and_no_variant(replica: Replica, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = make_model(replica.backbones)
    assert differing(model.vlm.vlm.state_dict(), replica.vlm.state_dict()) == []
    assert differing(model.dit.state_dict(), replica.dit.state_dict()) == []
    assert differing(model.vae.vae.state_dict(), replica.vae.state_dict()) == []
    assert model.vae.scaling_factor == 0.41407
    assert torch.equal(model.vlm.mean.flatten(), torch.tensor([0.5] * 3))
    # Pickles lie beside all of them.
    assert not (tmp_path / "UNPICKLED").exists()


def test_a_step_from_the_published_folders_is_that_from_our_own(replica: Replica, backbones: Backbones, tmp_path: Path):
    """The same numbers in the layout that this project writes: one file each, names as in memory."""
    replica.vlm.save_pretrained(tmp_path / "vlm")
    AutoProcessor.from_pretrained(backbones.vlm, use_fast=True).save_pretrained(tmp_path / "vlm")
    replica.dit.save_pretrained(tmp_path / "sana/transformer")
    replica.vae.save_pretrained(tmp_path / "sana/vae")
    ours, theirs = (
        single(Case(), used) for used in (replica.backbones, Backbones(vlm=tmp_path / "vlm", sana=tmp_path / "sana"))
    )
    assert (ours.losses, ours.norms) == (theirs.losses, theirs.norms)
    assert ours.norms[0] > 0


@pytest.fixture(scope="module")
def exported(replica: Replica, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    """The export after one step of a stage that trains all, and the weights after it."""
    folder = tmp_path_factory.mktemp("run")
    paths = (f"backbones.vlm={replica.backbones.vlm}", f"backbones.sana={replica.backbones.vae.parent}")
    run = load_curriculum(REPOSITORY / "configs/shapes/curriculum.yaml", (*paths, *OVERRIDES)).stage_run("stage2")
    (folder / "stage2").mkdir()
    dump(run, folder / "stage2" / "config.yaml")
    case = Case()
    model = case.model(replica.backbones)
    engine = SingleEngine(model, case.loss(model), case.run.changed({"stage.global_batch": 4}))
    engine.accumulate([make_batch(PromptEncoder(replica.backbones.vlm), range(4))], 0)
    engine.step(1.0)
    # As if the stage had made its two steps.
    state = dataclasses.replace(engine.state(), steps=2)
    frozen = {"vlm": identity(replica.backbones.vlm), "vae": identity(replica.backbones.vae)}
    store.save(folder / "stage2/checkpoints", state, {}, Origin("stage2", run.seed, run.stage.resolution, frozen))
    convert(folder, out=folder / "export", forward=False)
    return folder / "export", {name: tensor.clone() for name, tensor in state.weights.items()}


@torch.no_grad()
def test_stock_libraries_load_the_export(replica: Replica, exported: tuple[Path, dict[str, Tensor]]):
    export, trained = exported
    pipe = DiffusionPipeline.from_pretrained(export, custom_pipeline=str(export), trust_remote_code=True)
    of_dit = {name.removeprefix("dit."): tensor for name, tensor in trained.items() if name.startswith("dit.")}
    assert differing(dict(pipe.transformer.named_parameters()), of_dit) == []
    before = dict(replica.dit.named_parameters())
    assert sum(not torch.equal(tensor, before[name]) for name, tensor in of_dit.items()) > len(of_dit) / 2
    assert differing(pipe.vae.state_dict(), replica.vae.state_dict()) == []
    vlm = Qwen2_5_VLForConditionalGeneration.from_pretrained(export / "vlm").eval()
    ids = torch.arange(8)[None]
    assert torch.equal(vlm(input_ids=ids).logits, replica.vlm(input_ids=ids).logits)
    dit = SanaTransformer2DModel.from_pretrained(export / "transformer")
    assert differing(dict(dit.named_parameters()), of_dit) == []


def test_the_published_scheduler_is_the_one_that_stock_diffusers_reads(replica: Replica):
    """Its shift belongs to text to image at 1024 px; training takes `objective.time.shift` from the config."""
    scheduler = DPMSolverMultistepScheduler.from_pretrained(replica.backbones.vae.parent / "scheduler")
    assert scheduler.config.flow_shift == 3.0


@pytest.mark.parametrize("kind", SANAS)
def test_every_sana_loads_and_trains_a_step(backbones: Backbones, tmp_path: Path, kind: str):
    torch.manual_seed(3)
    dit = SanaTransformer2DModel(**DIT_CONFIG | SANAS[kind])
    replicas.sana(tmp_path, dit, AutoencoderDC.from_pretrained(backbones.vae), torch.bfloat16)
    used = Backbones(vlm=backbones.vlm, sana=tmp_path)
    loaded, _ = load_dit(used.dit, torch.float32)
    assert differing(loaded.state_dict(), narrow(dit).state_dict()) == []
    outcome = single(Case(), used)
    _, parts = outcome.gradients["dit.transformer_blocks.0.attn1.to_q.weight"]
    assert abs(parts[0][1]).max() > 0
    _, parts = outcome.gradients["dit.caption_projection.linear_1.weight"]
    assert abs(parts[0][1]).max() > 0


def drop_from_index(directory: Path) -> str:
    """Take a tensor that a shard holds out of the index."""
    (file,) = directory.glob("*.safetensors.index.json")
    index = json.loads(file.read_text())
    name = sorted(index["weight_map"])[0]
    del index["weight_map"][name]
    file.unlink()
    file.write_text(json.dumps(index))
    return f"does not list {name}, which model-0000"


def drop_blob(directory: Path) -> str:
    """Leave the link of a download that was broken off."""
    file = sorted(directory.glob("*-of-*.safetensors"))[0]
    file.resolve().unlink()
    return f"lacks {file.name}"


def name_the_cache(directory: Path) -> str:
    """The folder that a user finds in ~/.cache holds the model two folders deeper."""
    home = directory.parents[1]
    return f"name {home / 'snapshots' / directory.name}"


@pytest.mark.parametrize("damage", [drop_from_index, drop_blob, name_the_cache])
def test_what_is_not_whole_in_the_hubs_cache_is_named(
    replica: Replica, backbones: Backbones, tmp_path: Path, damage: Callable[[Path], str]
):
    replicas.qwen2_5_vl(tmp_path / "vlm", replica.vlm, flat_config(replica.vlm), backbones.vlm)
    snapshot = replicas.as_hub_cache(tmp_path / "vlm", tmp_path / "cache", "Qwen/Qwen2.5-VL-3B-Instruct")
    told = damage(snapshot)
    named = snapshot.parents[1] if damage is name_the_cache else snapshot
    (problem,) = problems(backbones.model_copy(update={"vlm": named}), ("vlm",))[:1]
    assert told in problem
    with pytest.raises(BackboneError):
        load_vlm(named, torch.float32)


def test_the_headers_in_front_of_holes_are_files_of_the_published_kind(tmp_path: Path):
    tensors = {"a": torch.empty(2, 3, dtype=torch.bfloat16, device="meta"), "b": torch.empty(1, device="meta")}
    replicas.write_tensors(tmp_path / "x.safetensors", tensors)
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert {name: file.get_slice(name).get_shape() for name in file.keys()} == {"a": [2, 3], "b": [1]}  # noqa: SIM118
        assert file.get_tensor("a").dtype == torch.bfloat16
