"""Shared code for ViTs of transformers: a sequence of one CLS token, register tokens, then patches."""

from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor

from wemmu.backbones.weights import LoadReport, load_strict
from wemmu.published.check import check_class
from wemmu.published.known import ENCODER
from wemmu.published.layout import read_json


class ViT:
    """See `wemmu.backbones.encoders.encoder.EncoderAdapter`. The embedding is the CLS token after the last norm."""

    # Class that a config.json names -> the class of transformers.
    classes: ClassVar[dict[str, type[Any]]]

    def load(self, directory: Path, dtype: torch.dtype) -> tuple[nn.Module, LoadReport]:
        return load_strict(self.classes[check_class(directory / "config.json", ENCODER)], directory, dtype)

    def processor(self, directory: Path) -> Any:
        # Checked here: without this file transformers would fall back to defaults of its own.
        read_json(directory / "preprocessor_config.json")
        # The fast ones compute with torch: on any device, and with gradients.
        return AutoImageProcessor.from_pretrained(directory, use_fast=True)

    def embed(self, model: Any, pixels: Tensor) -> Tensor:
        return model(pixels).last_hidden_state[:, 0]

    def patches(self, model: Any, pixels: Tensor) -> Tensor:
        registers = getattr(model.config, "num_register_tokens", 0)
        return model(pixels).last_hidden_state[:, 1 + registers :]

    def patch_px(self, model: Any) -> int:
        return model.config.patch_size
