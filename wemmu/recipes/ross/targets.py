"""What the head of ROSS must reconstruct of each image: pixels, latents, or features, on the grid of the VLM's tokens.

M images, C channels, a grid of h x w tokens. One rule aligns all targets: the VLM sees the whole image, resized to
whole tokens, so each target is made of the whole image, resized to whole cells. Cell (r, c) of the target and token
(r, c) of the VLM cover the same share of the image, and nothing is cropped away. A target with a grid of its own is
resampled (`on_grid`).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wemmu.backbones.cache import FeatureCache
from wemmu.backbones.encoders import ImageEncoder
from wemmu.backbones.patches import resize
from wemmu.backbones.vae import FrozenVAE
from wemmu.recipes.ross.config import Features, Latents, LatentToPixel, Pixels, Ross

Grid = tuple[int, int]
# Beside the variance of a patch or a feature vector; MAE's and a layer norm's.
EPSILON = 1e-6


class Target:
    """One kind of target. `channels` is C of what the head predicts for each token."""

    channels: int

    @torch.no_grad()
    def encode(self, pixels: Tensor, grid: Grid) -> Tensor:
        """Encode uint8 [M, 3, H, W] as float32 [M, C', *grid]; C' is `channels` unless the prediction is decoded."""
        raise NotImplementedError

    def decoded(self, predicted: Tensor) -> Tensor:
        """Return what a regression compares with `encode`, with gradient: the head's prediction [M, C, h, w] itself."""
        return predicted

    @torch.no_grad()
    def image(self, predicted: Tensor, pixels: Tensor) -> Tensor:
        """Return the image of a prediction [M, C, h, w]: [M, 3, H', W'], nominally in [-1, 1].

        pixels: uint8 [M, 3, H, W], the image itself, for what the target does not contain.
        """
        raise NotImplementedError


class PixelTarget(Target):
    """The patch of each token, channel by channel: 3 * side^2 values in [-1, 1], or normalised by patch."""

    def __init__(self, config: Pixels, side: int):
        """side: px of a token."""
        self.channels, self._side, self._by_patch = 3 * side**2, side, config.norm == "patch"

    @torch.no_grad()
    def encode(self, pixels: Tensor, grid: Grid) -> Tensor:
        patches = self._patches(pixels, grid)
        if not self._by_patch:
            return patches
        mean, std = _statistics(patches)
        return (patches - mean) / std

    @torch.no_grad()
    def image(self, predicted: Tensor, pixels: Tensor) -> Tensor:
        """Return the image; a normalised patch gets the brightness and contrast of the input, as in MAE's figures."""
        if self._by_patch:
            rows, columns = predicted.shape[-2:]
            mean, std = _statistics(self._patches(pixels, (rows, columns)))
            predicted = predicted * std + mean
        return F.pixel_shuffle(predicted, self._side)

    def _patches(self, pixels: Tensor, grid: Grid) -> Tensor:
        return F.pixel_unshuffle(_scaled(pixels, grid, self._side, rounded=True), self._side)


class LatentTarget(Target):
    """Latents of the frozen autoencoder, `group` x `group` of them for each token."""

    def __init__(self, config: Latents | LatentToPixel, vae: FrozenVAE):
        self._vae, self._group = vae, config.group
        self.channels = vae.latent_channels * config.group**2

    @torch.no_grad()
    def encode(self, pixels: Tensor, grid: Grid) -> Tensor:
        latents = self._vae.encode(pixels, (grid[0] * self._group, grid[1] * self._group))
        return F.pixel_unshuffle(latents.float(), self._group)

    @torch.no_grad()
    def image(self, predicted: Tensor, pixels: Tensor) -> Tensor:
        return self._vae.decode(F.pixel_shuffle(predicted, self._group)).float()


class FeatureTarget(Target):
    """Patch features of a frozen encoder, which sees the whole image at its published size, squeezed to a square.

    The published preprocessing would crop the middle, and no feature would stand for the border tokens.
    """

    def __init__(self, config: Features, teacher: ImageEncoder):
        self._teacher, self._normed = teacher, config.norm == "layer"
        processor = teacher.processor
        size = processor.crop_size or processor.size
        self._side = int(size["height"])
        self._mean, self._std = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
        whole: Any = teacher.model.config
        # CLIP's is that of two towers.
        vision = getattr(whole, "vision_config", whole)
        self.channels = int(vision.hidden_size)
        self.cache = FeatureCache()

    @torch.no_grad()
    def encode(self, pixels: Tensor, grid: Grid) -> Tensor:
        features = on_grid(self.cache(self._features, pixels), grid)
        return (
            F.layer_norm(features.movedim(1, -1), (self.channels,), eps=EPSILON).movedim(-1, 1)
            if self._normed
            else features
        )

    def _features(self, pixels: Tensor) -> Tensor:
        """[M, C, h, w] on the encoder's own grid."""
        teacher, device = self._teacher, pixels.device
        images = resize(pixels, self._side, self._side) / 255
        seen = ((images - self._mean.to(device)) / self._std.to(device)).to(teacher.dtype)
        rows = self._side // teacher.adapter.patch_px(teacher.model)
        return teacher.adapter.patches(teacher.model, seen).float().transpose(1, 2).unflatten(2, (rows, rows))

    @torch.no_grad()
    def image(self, predicted: Tensor, pixels: Tensor) -> Tensor:
        """Show the features' three principal components over the batch as red, green and blue."""
        flat = predicted.movedim(1, -1).flatten(0, 2)
        flat = flat - flat.mean(0)
        _, _, v = torch.linalg.svd(flat, full_matrices=False)
        # Of each component's two signs, the one whose largest entry is positive.
        v = v[:3] * v[:3].gather(1, v[:3].abs().argmax(1, keepdim=True)).sign()
        colors = flat @ v.T
        colors = (colors / colors.abs().amax(0).clamp(min=EPSILON)).unflatten(
            0, (len(predicted), *predicted.shape[-2:])
        )
        return F.interpolate(colors.movedim(-1, 1), pixels.shape[-2:], mode="nearest")


class LatentToPixelTarget(LatentTarget):
    """The head predicts latents; the loss compares the pixels that the frozen autoencoder decodes from them."""

    def __init__(self, config: LatentToPixel, vae: FrozenVAE):
        super().__init__(config, vae)
        self._side = config.group * vae.latent_px

    @torch.no_grad()
    def encode(self, pixels: Tensor, grid: Grid) -> Tensor:
        return F.pixel_unshuffle(_scaled(pixels, grid, self._side), self._side)

    def decoded(self, predicted: Tensor) -> Tensor:
        latents = F.pixel_shuffle(predicted, self._group)
        return F.pixel_unshuffle(self._vae.decode_with_gradient(latents).float(), self._side)


def make_target(config: Ross, side: int, vae: FrozenVAE | None, teacher: ImageEncoder | None) -> Target:
    """Return the target of a config. side: px of a VLM token. vae: of latents. teacher: of `Features`."""
    match config.target:
        case Pixels():
            return PixelTarget(config.target, side)
        case LatentToPixel():
            assert vae is not None, "the config asks for it"
            return LatentToPixelTarget(config.target, vae)
        case Latents():
            assert vae is not None, "the config asks for it"
            return LatentTarget(config.target, vae)
        case Features():
            assert teacher is not None, "`build_ross` loads it"
            return FeatureTarget(config.target, teacher)


def on_grid(features: Tensor, grid: Grid) -> Tensor:
    """Resample [M, C, h, w] to [M, C, *grid]: bilinear between centres of cells, averaged to a coarser grid.

    Both grids cover the same image, so a cell keeps its share of it.
    """
    if tuple(features.shape[-2:]) == grid:
        return features
    return F.interpolate(features, grid, mode="bilinear", antialias=True, align_corners=False)


def _scaled(pixels: Tensor, grid: Grid, side: int, rounded: bool = False) -> Tensor:
    """uint8 [M, 3, H, W] -> [M, 3, rows * side, columns * side] in [-1, 1]; rounded: as the VLM sees it, in bytes."""
    resized = resize(pixels, grid[0] * side, grid[1] * side)
    return (resized.round() if rounded else resized) / 127.5 - 1


def _statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over the channels: each [M, 1, h, w]."""
    return patches.mean(1, keepdim=True), (patches.var(1, keepdim=True) + EPSILON).sqrt()
