"""A frozen image encoder: images in [0, 1] -> the published preprocessing -> one embedding, or a grid of features."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wemmu.backbones.encoders.vit.adapter import ViT
from wemmu.backbones.weights import LoadReport, made_of
from wemmu.published.check import check, check_class
from wemmu.published.known import ENCODER, KNOWN

# One batch [B, 3, H, W], or images [3, H, W] of different sizes; floats in [0, 1].
Images = Tensor | Sequence[Tensor]


class ImageEncoder(nn.Module):
    """One frozen encoder. Rewards and metrics share it, so both preprocess in the same way.

    The model stays in eval mode and has no gradients of its own, but gradients pass through it to the images.
    """

    def __init__(self, name: str, model: nn.Module, adapter: ViT, processor: Any, report: LoadReport):
        super().__init__()
        self.name, self.adapter, self.processor, self.report = name, adapter, processor, report
        self.model = model.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> "ImageEncoder":
        """Stay in eval mode: a frozen model has no training behaviour."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def preprocess(self, images: Images) -> Tensor:
        """Convert images in [0, 1] to the model's input [B, 3, h, w], by the directory's preprocessor_config.json.

        Without gradients the images are rounded to 8 bits first, as a file stores them, so that an image scores the
        same before and after it is saved. Images that need a gradient are resized as floats.

        Raises:
            ValueError: for pixels outside of [0, 1], integers, or other shapes.
        """
        _check(images)
        listed = list(images)
        if torch.is_grad_enabled() and any(image.requires_grad for image in listed):
            found = self.processor(images=[i.float() for i in listed], do_rescale=False, return_tensors="pt")
        else:
            bytes_ = [(i.detach().float() * 255).round().to(torch.uint8) for i in listed]
            found = self.processor(images=bytes_, return_tensors="pt")
        return found["pixel_values"].to(self.device, self.dtype)

    def embed(self, images: Images) -> Tensor:
        """Embed images in [0, 1]: float32 [B, D], not normalised."""
        return self.adapter.embed(self.model, self.preprocess(images)).float()

    def patches(self, images: Images) -> Tensor:
        """Return features of the last layer for images in [0, 1]: float32 [B, C, h, w], one per patch."""
        pixels = self.preprocess(images)
        px = self.adapter.patch_px(self.model)
        grid = (pixels.shape[-2] // px, pixels.shape[-1] // px)
        return self.adapter.patches(self.model, pixels).float().transpose(1, 2).unflatten(2, grid)


def load_encoder(directory: Path, dtype: torch.dtype = torch.float32, name: str | None = None) -> ImageEncoder:
    """Load an encoder from a directory in its published layout; only safetensors, nothing is unpickled.

    name: what results call it; else the directory's name.

    Raises:
        BackboneError: for an unknown architecture (lists the known ones), or files that are missing or broken.
    """
    check(directory, ENCODER)
    adapter = _adapter(directory)
    with made_of(directory, type(adapter).__name__):
        model, report = adapter.load(directory, dtype)
        return ImageEncoder(name or directory.name, model, adapter, adapter.processor(directory), report)


def encoder_without_weights(directory: Path) -> nn.Module:
    """Return the model of an encoder of which there is the config.json alone, as new; raises as `load_encoder`."""
    return _adapter(directory).without_weights(directory)


def _adapter(directory: Path) -> ViT:
    family = KNOWN[ENCODER][check_class(directory / "config.json", ENCODER)]
    adapter: ViT = import_module(f"wemmu.backbones.{family}.adapter").ADAPTER
    return adapter


def cosine(x: Tensor, y: Tensor) -> Tensor:
    """Return the cosine of embeddings [..., D] and [..., D] in float32: [...]."""
    return nn.functional.cosine_similarity(x.float(), y.float(), dim=-1)


def _check(images: Images) -> None:
    shape = tuple(images.shape) if isinstance(images, Tensor) else [tuple(image.shape) for image in images]
    if len(images) == 0 or any(image.ndim != 3 or image.shape[0] != 3 for image in images):
        raise ValueError(f"images of shape {shape}; valid: [B, 3, H, W], or a list of [3, H, W], with at least one")
    for image in images:
        if not image.is_floating_point():
            raise ValueError(f"an image of {image.dtype}; valid: floats in [0, 1]")
    # At once: the host waits for a GPU.
    for low, high in torch.stack([torch.stack(image.detach().float().aminmax()) for image in images]).tolist():
        # A decoder's clamp leaves no more than rounding outside. NaN fails, too.
        if not (low >= -1e-4 and high <= 1 + 1e-4):
            raise ValueError(f"an image holds values from {low:g} to {high:g}; valid: 0 to 1")
