"""Fidelity of images as arithmetic on pixels."""

import math

import torch
from torch import Tensor, nn

# A pixel is the same if no channel differs by more, of 1; JPEG and resizing leave less.
SAME = 0.06
# px around a change that count as changed, too: its edge is blurred.
MARGIN = 2
# dB of images that are equal in 8 bits: the error of rounding, a step's standard deviation.
HIGHEST_DB = 10 * math.log10(12 * 255**2)


def psnr(x: Tensor, y: Tensor, mask: Tensor | None = None) -> float | None:
    """Peak signal-to-noise ratio of images [3, H, W] in [0, 1], dB: -10 log10 of the mean squared error.

    mask: bool [H, W], the pixels that count; None without any. At most `HIGHEST_DB`, so that means are finite.
    """
    error = (x - y).square().mean(0)
    error = error if mask is None else error[mask]
    if error.numel() == 0:
        return None
    return min(-10 * math.log10(max(error.mean().item(), 1e-12)), HIGHEST_DB)


def unasked(source: Tensor, target: Tensor) -> Tensor:
    """Return which pixels the edit leaves alone, bool [H, W]: where source and target [3, H, W] are the same."""
    changed = ((source - target).abs().amax(0) > SAME).float()
    grown = nn.functional.max_pool2d(changed[None, None], 2 * MARGIN + 1, 1, MARGIN)[0, 0]
    return grown == 0


def identity(source: Tensor, output: Tensor, mask: Tensor) -> float | None:
    """Return the share of the pixels of `mask` that the output keeps; None if there are none."""
    kept = (source - output).abs().amax(0) <= 2 * SAME
    return kept[mask].float().mean().item() if bool(mask.any()) else None


def closer_to_target(source: Tensor, target: Tensor, output: Tensor) -> float | None:
    """Return 1 if where the edit changes pixels the output is nearer to the target than to the source, else 0."""
    changed = ~unasked(source, target)
    if not bool(changed.any()):
        return None
    to_target, to_source = ((output - image).abs().mean(0)[changed].mean() for image in (target, source))
    return float(torch.lt(to_target, to_source).item())
