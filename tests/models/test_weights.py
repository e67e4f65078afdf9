"""Backbones are loaded whole or not at all."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wemmu.config.schema import Backbones
from wemmu.models.weights import load_backbones

# Part -> (its directory below the backbones', its weight file, one tensor of it).
PARTS = {
    "vlm": ("vlm", "model.safetensors", "model.layers.1.mlp.up_proj.weight"),
    "dit": ("sana/transformer", "diffusion_pytorch_model.safetensors", "transformer_blocks.2.attn2.to_k.weight"),
    "vae": ("sana/vae", "diffusion_pytorch_model.safetensors", "decoder.conv_in.weight"),
}


@pytest.fixture
def copied(backbones: Backbones, tmp_path: Path) -> Backbones:
    shutil.copytree(backbones.vlm, tmp_path / "vlm")
    shutil.copytree(backbones.sana, tmp_path / "sana")
    return Backbones(vlm=tmp_path / "vlm", sana=tmp_path / "sana")


@pytest.mark.parametrize("change", ["missing", "left over", "of another shape"])
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
    save_file(tensors, file, metadata={"format": "pt"})
    # transformers nests the language model deeper in memory than in the published file.
    with pytest.raises(ValueError, match=told.removeprefix("model.")):
        load_backbones(copied)


def test_a_directory_that_is_no_backbone_is_named(backbones: Backbones, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        load_backbones(Backbones(vlm=tmp_path, sana=backbones.sana))


def test_the_report_counts_what_was_loaded(backbones: Backbones):
    vlm, vae, dit, reports = load_backbones(backbones)
    assert [report.parameters for report in reports] == [
        sum(p.numel() for p in m.parameters()) for m in (vlm, vae, dit)
    ]
    assert all(not report.missing and not report.unexpected for report in reports)
    assert len({report.sha256 for report in reports}) == 3
