"""DeiT III as timm publishes it (timm/deit3_large_patch16_224.fb_in22k_ft_in1k), in the class of DINOv2.

Both are the same ViT: pre-norm, LayerScale, biases in the attention, exact GELU. DeiT III adds no position to its CLS
token, so that position is zero here. So timm is not needed. Equal to timm's `forward_features`, which a test compares
where timm is installed.
"""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BitImageProcessorFast, Dinov2Config, Dinov2Model

from wemmu.backbones.encoders.vit.adapter import ViT
from wemmu.backbones.weights import LoadReport
from wemmu.published.identity import identity
from wemmu.published.layout import TRANSFORMERS, BackboneError, read_json, weight_files

# Size in the architecture's name -> attention heads, which no weight's shape tells, layers and width.
SIZES = {"small": (6, 12, 384), "medium": (8, 12, 512), "base": (12, 12, 768), "large": (16, 24, 1024)}
SIZES["huge"] = (16, 32, 1280)
TOP = {
    "cls_token": "embeddings.cls_token",
    "patch_embed.proj.weight": "embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "embeddings.patch_embeddings.projection.bias",
    "norm.weight": "layernorm.weight",
    "norm.bias": "layernorm.bias",
}
BLOCK = {
    "norm1": "norm1",
    "norm2": "norm2",
    "ls1.gamma": "layer_scale1.lambda1",
    "ls2.gamma": "layer_scale2.lambda1",
    "attn.proj": "attention.output.dense",
    "mlp": "mlp",
}


class DeiT3(ViT):
    def load(self, directory: Path, dtype: torch.dtype) -> tuple[nn.Module, LoadReport]:
        heads, _, _ = _size(directory)
        (file,) = weight_files(directory, TRANSFORMERS)
        stored = load_file(file)
        try:
            vit, state = _config(stored, heads), _renamed(stored)
        except (KeyError, ValueError, IndexError) as error:
            raise BackboneError(f"{file} does not hold a DeiT III in timm's layout: {error}") from error
        # Masked patches exist in DINOv2's pre-training only.
        state["embeddings.mask_token"] = torch.zeros(1, vit.hidden_size)
        # The names are those of published files; transformers 5 has others in memory.
        model, info = Dinov2Model.from_pretrained(
            None, config=vit, state_dict=state, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
        )
        problems = [*info["missing_keys"], *info["unexpected_keys"], *map(str, info["mismatched_keys"])]
        if problems:
            raise BackboneError(f"{file} does not hold a DeiT III in timm's layout; first of them: {problems[:5]}")
        return model, LoadReport(str(directory), sum(t.numel() for t in stored.values()), identity(directory))

    def without_weights(self, directory: Path) -> nn.Module:
        heads, layers, width = _size(directory)
        architecture = read_json(directory / "config.json")["architecture"]
        patch, px = (int(word.removeprefix("patch")) for word in architecture.partition(".")[0].split("_")[2:4])
        return Dinov2Model(
            Dinov2Config(
                hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, patch_size=patch, image_size=px
            )
        )

    def processor(self, directory: Path) -> Any:
        pretrained = read_json(directory / "config.json").get("pretrained_cfg", {})
        if absent := [key for key in ("input_size", "mean", "std", "interpolation") if key not in pretrained]:
            raise BackboneError(f"{directory / 'config.json'} lacks pretrained_cfg.{', pretrained_cfg.'.join(absent)}")
        px = pretrained["input_size"][-1]
        return BitImageProcessorFast(
            size={"shortest_edge": int(px / pretrained.get("crop_pct", 1.0))},
            crop_size={"height": px, "width": px},
            resample=Image.Resampling[pretrained["interpolation"].upper()],
            image_mean=pretrained["mean"],
            image_std=pretrained["std"],
        )


def _size(directory: Path) -> tuple[int, int, int]:
    architecture: str = read_json(directory / "config.json")["architecture"]
    size = architecture.split("_")[1]
    if size not in SIZES:
        raise BackboneError(f"{directory} holds {architecture}; valid sizes: {', '.join(SIZES)}")
    return SIZES[size]


def _config(stored: dict[str, Tensor], heads: int) -> Dinov2Config:
    width, _, patch, _ = stored["patch_embed.proj.weight"].shape
    return Dinov2Config(
        hidden_size=width,
        num_hidden_layers=1 + max(int(name.split(".")[1]) for name in stored if name.startswith("blocks.")),
        num_attention_heads=heads,
        mlp_ratio=stored["blocks.0.mlp.fc1.weight"].shape[0] // width,
        patch_size=patch,
        image_size=patch * round(stored["pos_embed"].shape[1] ** 0.5),
    )


def _renamed(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of timm -> names of Dinov2Model; the classifier is left out."""
    state: dict[str, Tensor] = {}
    for name, tensor in stored.items():
        if name.startswith("head."):
            continue
        if name == "pos_embed":
            state["embeddings.position_embeddings"] = nn.functional.pad(tensor, (0, 0, 1, 0))
        elif name.startswith("blocks."):
            _, block, inner = name.split(".", 2)
            layer = f"encoder.layer.{block}"
            if inner.startswith("attn.qkv."):
                for part, piece in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                    state[f"{layer}.attention.attention.{part}.{inner.removeprefix('attn.qkv.')}"] = piece
            else:
                old = next((old for old in BLOCK if inner == old or inner.startswith(f"{old}.")), None)
                state[f"{layer}.{inner if old is None else BLOCK[old] + inner.removeprefix(old)}"] = tensor
        else:
            state[TOP.get(name, name)] = tensor
    return state


ADAPTER = DeiT3()
