"""Query designs, all with one signature.

`queries(height, width, noise)` takes the VLM's token grid of the target image and returns tokens [B, h * w, D] for
`(h, w) = queries.grid(height, width)`.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wemmu.noise import Noise
from wemmu.recipes.wemmu.config import Queries as QueryConfig
from wemmu.recipes.wemmu.position_mlp import center_crop


def sincos(height: int, width: int, channels: int, device: torch.device | str | None = None) -> Tensor:
    """Return the 2-D sine-cosine code of a grid, [h * w, channels]: rows in the first half, columns in the second."""
    quarter = channels // 4
    # Angles of n / 100^k, k from 0 to 1: neighbours differ in a grid of up to 100 tokens.
    frequencies = 100.0 ** -torch.linspace(0, 1, quarter, device=device)
    codes = []
    for n in (height, width):
        angles = torch.arange(n, device=device)[:, None] * frequencies
        codes.append(F.pad(torch.cat([angles.sin(), angles.cos()], dim=-1), (0, channels // 2 - 2 * quarter)))
    rows, columns = codes
    code = torch.cat([rows[:, None].expand(-1, width, -1), columns.expand(height, -1, -1)], dim=-1)
    return F.pad(code, (0, channels - code.shape[-1])).flatten(0, 1)


class NoisyQueries(nn.Module):
    """Q ~ N(0, std^2 I), new at every step, one per VLM token of the image. No parameters."""

    def __init__(self, width: int, std: float):
        super().__init__()
        self.width, self.std = width, std

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def forward(self, height: int, width: int, noise: Noise) -> Tensor:
        return self.std * noise.normal("queries", (height * width, self.width))


class LearnableFixedQueries(nn.Module):
    """A fixed number of trained vectors, whatever the resolution (MetaQueries)."""

    def __init__(self, width: int, number: int, std: float):
        super().__init__()
        self.side = math.isqrt(number)
        if self.side**2 != number:
            raise ValueError(f"queries.number must be a square, so that queries have a grid; got {number}")
        self.tokens = nn.Parameter(std * torch.randn(number, width))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return self.side, self.side

    def forward(self, height: int, width: int, noise: Noise) -> Tensor:
        return self.tokens.expand(len(noise.sample_ids), -1, -1)


class LearnableDynamicQueries(nn.Module):
    """A trained table of `side` x `side` vectors, cropped from its centre to the image's grid."""

    def __init__(self, width: int, side: int, std: float):
        super().__init__()
        self.table = nn.Parameter(std * torch.randn(side, side, width))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def forward(self, height: int, width: int, noise: Noise) -> Tensor:
        return center_crop(self.table, height, width).flatten(0, 1).expand(len(noise.sample_ids), -1, -1)


def build_queries(config: QueryConfig, width: int, table_side: int) -> nn.Module:
    """Return the design in `config`, for pathway tokens of `width` channels."""
    match config.design:
        case "noisy":
            return NoisyQueries(width, config.std)
        case "learnable_fixed":
            return LearnableFixedQueries(width, config.number, config.std)
        case "learnable_dynamic":
            return LearnableDynamicQueries(width, table_side, config.std)
