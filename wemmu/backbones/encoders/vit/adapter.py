"""ViTs of transformers, such as facebook/dinov2-large, the variants with registers, and DINOv3.

A sequence is one CLS token, register tokens, then patches.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoConfig, AutoImageProcessor

from wemmu.backbones.weights import LoadReport, load_strict
from wemmu.published.check import check_class
from wemmu.published.known import ENCODER
from wemmu.published.layout import read_json


class ViT:
    """What differs between families of encoders; like other adapters it has no weights and no state."""

    def load(self, directory: Path, dtype: torch.dtype) -> tuple[nn.Module, LoadReport]:
        cls = getattr(transformers, check_class(directory / "config.json", ENCODER))
        return load_strict(cls, directory, dtype)

    def without_weights(self, directory: Path) -> nn.Module:
        """Return the model that the config.json of a directory describes, as new."""
        cls = getattr(transformers, check_class(directory / "config.json", ENCODER))
        return cls(AutoConfig.from_pretrained(directory))

    def processor(self, directory: Path) -> Any:
        """Return the image processor of transformers that the directory describes."""
        # Checked here: without this file transformers would fall back to defaults of its own.
        read_json(directory / "preprocessor_config.json")
        # The fast ones compute with torch: on any device, and with gradients.
        return AutoImageProcessor.from_pretrained(directory, use_fast=True)

    def embed(self, model: Any, pixels: Tensor) -> Tensor:
        """Return the published embedding [B, D] of preprocessed pixels [B, 3, h, w]."""
        # The CLS token after the last norm.
        return model(pixels).last_hidden_state[:, 0]

    def patches(self, model: Any, pixels: Tensor) -> Tensor:
        """Return the normed features of the last layer [B, rows * columns, C] for preprocessed pixels [B, 3, h, w]."""
        registers = getattr(model.config, "num_register_tokens", 0)
        return model(pixels).last_hidden_state[:, 1 + registers :]

    def patch_px(self, model: Any) -> int:
        return model.config.patch_size


ADAPTER = ViT()
