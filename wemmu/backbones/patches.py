"""Images -> the flattened patches that Qwen2.5-VL's vision tower takes.

The processor of the VLM works on one PIL image at a time; the trainer has whole batches of one size on the device.
`tests/test_vlm.py` holds the two to be equal.
"""

import torch.nn.functional as F
from torch import Tensor


def resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Resize uint8 [B, 3, H, W] to float32 [B, 3, height, width] from 0 to 255, bicubic with antialiasing.

    In float32, for 16 bits cannot tell neighbouring levels apart once they are weighted, and a CPU has no kernel for
    them. What the interpolation overshoots at an edge is cut off.
    """
    pixels = pixels.float()
    if pixels.shape[-2:] == (height, width):
        return pixels
    return F.interpolate(pixels, (height, width), mode="bicubic", antialias=True).clamp(0, 255)


def patchify(pixels: Tensor, patch: int, merge: int, temporal: int) -> Tensor:
    """Cut normalised pixels [B, 3, H, W] into patches [B * (H/patch) * (W/patch), 3 * temporal * patch^2].

    Patches are ordered by merge block, as the tower's merger expects; a still image fills all `temporal` frames.
    """
    b, c, height, width = pixels.shape
    rows, columns = height // (patch * merge), width // (patch * merge)
    x = pixels.reshape(b, c, rows, merge, patch, columns, merge, patch)
    x = x.permute(0, 2, 5, 3, 6, 1, 4, 7)  # [B, rows, columns, merge, merge, C, patch, patch]
    x = x.unsqueeze(6).expand(*x.shape[:6], temporal, patch, patch)
    return x.reshape(b * rows * columns * merge * merge, c * temporal * patch * patch)
