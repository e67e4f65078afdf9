"""Backbones are loaded whole or not at all."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from wemmu.backbones.weights import blocks, load_dit, load_strict
from wemmu.config.schema import Backbones
from wemmu.published.layout import BackboneError
from wemmu.recipes.wemmu.build import build_model
from wemmu.recipes.wemmu.config import Bridge

# Part -> (its directory below the backbones', its weight file, one tensor of it).
PARTS = {
    "vlm": ("vlm", "model.safetensors", "model.layers.1.mlp.up_proj.weight"),
    "dit": ("sana/transformer", "diffusion_pytorch_model.safetensors", "transformer_blocks.2.attn2.to_k.weight"),
    "vae": ("sana/vae", "diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
}


@pytest.mark.parametrize("change", ["missing", "left over", "of another shape", "not a number", "infinite"])
@pytest.mark.parametrize("part", PARTS)
def test_a_tensor_that_does_not_fit_is_named(copied: Backbones, part: str, change: str):
    directory, name, tensor = PARTS[part]
    file = copied.vlm.parent / directory / name
    tensors = load_file(file)
    told = tensor
    match change:
        case "missing":
            del tensors[tensor]
        case "left over":
            told = tensor.replace("weight", "extra")
            tensors[told] = torch.zeros(1)
        case "of another shape":
            tensors[tensor] = tensors[tensor][:-1].clone()
        case "not a number" | "infinite":
            tensors[tensor].view(-1)[-3] = float("nan" if change == "not a number" else "-inf")
            told = f"{name}: {tensor} holds NaN or infinity"
    save_file(tensors, file, metadata={"format": "pt"})
    # transformers nests the language model deeper in memory than in the published file.
    with pytest.raises(BackboneError, match=re.escape(told.removeprefix("model."))):
        build_model(copied, Bridge(), 0)


def test_a_directory_that_is_no_backbone_is_named(backbones: Backbones, tmp_path: Path):
    with pytest.raises(BackboneError, match=r"config\.json is needed"):
        build_model(Backbones(vlm=tmp_path, vae=backbones.vae, dit=backbones.dit), Bridge(), 0)


def test_the_report_counts_what_was_loaded(backbones: Backbones):
    model, reports = build_model(backbones, Bridge(position_table=8), 0)
    assert {name: report.parameters for name, report in reports.items()} == {
        name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in ("vlm", "vae", "dit")
    }
    assert all(not report.missing and not report.unexpected for report in reports.values())
    assert len({report.sha256 for report in reports.values()}) == 3


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return list(ours) == list(theirs) and all(
        torch.equal(tensor, theirs[name]) and tensor.dtype == theirs[name].dtype for name, tensor in ours.items()
    )


@pytest.mark.parametrize("files", ["one file", "several files"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_loaded_block_by_block_is_that_of_from_pretrained(
    backbones: Backbones, tmp_path: Path, dtype: torch.dtype, files: str
):
    directory = backbones.dit
    theirs, their_report = load_strict(SanaTransformer2DModel, directory, dtype)
    if files == "several files":
        theirs.save_pretrained(tmp_path, max_shard_size="1MB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        directory = tmp_path
        theirs, their_report = load_strict(SanaTransformer2DModel, directory, dtype)
    ours, report = load_dit(directory, dtype)
    assert same(ours.state_dict(), theirs.state_dict())
    assert same(dict(ours.named_buffers()), dict(theirs.named_buffers()))
    assert (ours.config, ours.training, report) == (theirs.config, theirs.training, their_report)


def test_blocks_have_all_weights_of_a_model_once(backbones: Backbones):
    dit, _ = load_dit(backbones.dit, torch.float32)
    *parts, (prefix, whole) = blocks(dit)
    assert (prefix, whole) == ("", dit)
    named = [prefix + name for prefix, block in parts for name in block.state_dict()]
    assert sorted([*named, "scale_shift_table"]) == sorted(dit.state_dict())
    assert {"transformer_blocks.0.", "transformer_blocks.1.", "proj_out."} <= {prefix for prefix, _ in parts}


def test_the_pathway_is_a_copy_of_the_vlms_layers_with_memory_of_its_own(backbones: Backbones):
    model, _ = build_model(backbones, Bridge(position_table=8), seed=0)
    original, pathway = model.vlm.language_model, model.bridge.pathway
    assert same(pathway.layers.state_dict(), original.layers.state_dict())
    assert same(pathway.norm.state_dict(), original.norm.state_dict())
    assert same(dict(pathway.rotary.named_buffers()), dict(original.rotary_emb.named_buffers()))
    assert not {p.data_ptr() for p in pathway.parameters()} & {p.data_ptr() for p in original.parameters()}
    assert all(p.requires_grad for p in model.bridge.parameters())


def test_what_is_placed_is_whole_and_what_comes_later_has_no_memory_yet(backbones: Backbones):
    """Places by throwing the weights away, as shards would be left; a block that is placed must not be read again."""
    seen: list[int] = []
    names: list[str] = []

    def place(prefix: str, module: nn.Module) -> None:
        held = {name: p for name, p in module.named_parameters() if p.numel()}
        assert not any(p.is_meta for p in held.values())
        names.extend(prefix + name for name in held)
        seen.append(sum(p.numel() for p in held.values()))
        for parameter in held.values():
            parameter.data = torch.empty(0)

    model, _ = build_model(backbones, Bridge(position_table=8), seed=0, on_block_loaded=place)
    whole, _ = build_model(backbones, Bridge(position_table=8), seed=0)
    trainable = {n: p for n, p in whole.named_parameters() if n.startswith(("bridge.", "dit."))}
    count = sum(p.numel() for p in trainable.values())
    assert sorted(names) == sorted(trainable)
    assert sum(seen) == count
    assert max(seen) < count / 8
    assert not any(p.numel() for part in (model.bridge, model.dit) for p in part.parameters())
