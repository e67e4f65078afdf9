"""Fidelity of images as arithmetic on pixels."""

import math

import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

# A pixel is the same if no channel differs by more, of 1; JPEG and resizing leave less.
SAME = 0.06
# px around a change that count as changed, too: its edge is blurred.
MARGIN = 2
# Standard deviations of the blurs, px, at which two images are registered one after the other: the first finds large
# shifts, the last is exact.
BLURS = (4.0, 2.0, 1.0, 1.0)
# Smallest curvature of the error, of its mean over pixels, that tells where an image lies: less is a flat image.
LEAST_CURVATURE = 1e-6
# dB of images that are equal in 8 bits: the error of rounding, a step's standard deviation.
HIGHEST_DB = 10 * math.log10(12 * 255**2)


def psnr(x: Tensor, y: Tensor, mask: Tensor | None = None) -> float | None:
    """Return the peak signal-to-noise ratio of images [3, H, W] in [0, 1] in dB: -10 log10 of the mean squared error.

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


def pixel_shift(source: Tensor, output: Tensor, mask: Tensor | None = None) -> float | None:
    """Return how far `output` lies beside `source`, px, by registration to a fraction of a pixel.

    The translation that minimises the squared difference, by Gauss-Newton steps on blurred images (Lucas and Kanade,
    1981). It is exact to some hundredths of a px up to about 4 px. None for an image without edges in both directions.

    source, output: [3, H, W] in [0, 1]. mask: bool [H, W], the pixels that count; the border never does.
    """
    height, width = source.shape[-2:]
    counted = torch.ones(height, width, dtype=torch.bool) if mask is None else mask
    inner = torch.zeros_like(counted)
    inner[2 * MARGIN : height - 2 * MARGIN, 2 * MARGIN : width - 2 * MARGIN] = True
    counted = counted & inner
    moved = torch.zeros(2)  # (rows, columns)
    for sigma in BLURS:
        fixed, loose = _blurred(source, sigma), _translated(_blurred(output, sigma), moved)
        slope = torch.stack(torch.gradient((fixed + loose) / 2, dim=(1, 2)))[..., counted].flatten(1)  # [2, 3 n]
        curvature = slope @ slope.T / max(slope.shape[1], 1)
        if slope.shape[1] == 0 or torch.linalg.eigvalsh(curvature)[0] < LEAST_CURVATURE:
            return None
        error = (fixed - loose)[:, counted].flatten()
        moved = moved + torch.linalg.solve(curvature, slope @ error / slope.shape[1])
    return float(moved.norm())


def _blurred(image: Tensor, sigma: float) -> Tensor:
    wide = 2 * math.ceil(2 * sigma) + 1
    # Odd, and below the side, since the border is reflected.
    sizes = [min(wide, side - 1 + side % 2) for side in (image.shape[-1], image.shape[-2])]
    blurred: Tensor = gaussian_blur(image, sizes, [sigma])
    return blurred


def _translated(image: Tensor, by: Tensor) -> Tensor:
    """The image at places `by` = (rows, columns) px further, bilinear, the border repeated."""
    _, height, width = image.shape
    rows, columns = (torch.arange(side) + step for side, step in zip((height, width), by, strict=True))
    # grid_sample counts from -1 to 1, from edge to edge.
    y, x = (2 * rows + 1) / height - 1, (2 * columns + 1) / width - 1
    grid = torch.stack([x[None].expand(height, -1), y[:, None].expand(-1, width)], dim=-1)
    return nn.functional.grid_sample(image[None], grid[None], padding_mode="border", align_corners=False)[0]
