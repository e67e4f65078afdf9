"""CLIP: openai/clip-vit-large-patch14, and LongCLIP in the same layout.

LongCLIP changes CLIP's text tower, whose positions it stretches, and fine-tunes the vision tower; the vision tower's
class and names are CLIP's. The authors publish a pickle, which is not read: use its conversion to safetensors.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPVisionConfig, CLIPVisionModelWithProjection

from wemmu.backbones.encoders.vit.adapter import ViT
from wemmu.backbones.weights import LoadReport, load_strict
from wemmu.published.layout import read_json

# Weights of a whole CLIPModel that the vision tower does not have; earlier versions stored the constant position_ids.
UNUSED = ("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids")


class CLIP(ViT):
    """The embedding is CLIP's image feature."""

    def load(self, directory: Path, dtype: torch.dtype) -> tuple[nn.Module, LoadReport]:
        return load_strict(CLIPVisionModelWithProjection, directory, dtype, UNUSED, config=_config(directory))

    def without_weights(self, directory: Path) -> nn.Module:
        return CLIPVisionModelWithProjection(_config(directory))

    def embed(self, model: Any, pixels: Tensor) -> Tensor:
        return model(pixels).image_embeds

    def patches(self, model: Any, pixels: Tensor) -> Tensor:
        # The class normalises the CLS token only; LLaVA and others take the patches as they are.
        return model(pixels).last_hidden_state[:, 1:]


def _config(directory: Path) -> CLIPVisionConfig:
    if "vision_config" not in read_json(directory / "config.json"):
        return CLIPVisionConfig.from_pretrained(directory)
    whole = CLIPConfig.from_pretrained(directory)
    config = whole.vision_config
    # The projection's width belongs to the whole model; the vision tower's copy of it may be a default.
    config.projection_dim = whole.projection_dim
    return config


ADAPTER = CLIP()
