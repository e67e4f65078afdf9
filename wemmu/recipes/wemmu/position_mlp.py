"""From the pathway's states to the DiT's condition: a position table and a gated MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def center_crop(table: Tensor, height: int, width: int) -> Tensor:
    """The central [height, width, D] of a table [side, side, D].

    Grids of different sizes share the centre of the table, so what a low resolution trains serves a higher one.

    Raises:
        ValueError: if the grid is larger than the table.
    """
    side = table.shape[0]
    if max(height, width) > side:
        raise ValueError(f"a grid of {height} x {width} tokens does not fit recipe.bridge.position_table = {side}")
    top, left = (side - height) // 2, (side - width) // 2
    return table[top : top + height, left : left + width]


class PositionMLP(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x), x = state + P[row, column]; width D -> caption channels."""

    def __init__(self, width: int, caption_channels: int, side: int, std: float):
        super().__init__()
        self.table = nn.Parameter(std * torch.randn(side, side, width))
        self.gate = nn.Linear(width, caption_channels, bias=False)
        self.up = nn.Linear(width, caption_channels, bias=False)
        self.down = nn.Linear(caption_channels, caption_channels, bias=False)

    def forward(self, states: Tensor, height: int, width: int) -> Tensor:
        """states [B, h * w, D] -> [B, h * w, caption channels]."""
        x = states + center_crop(self.table, height, width).flatten(0, 1)
        return self.down(F.silu(self.gate(x)) * self.up(x))
