"""From the pathway's states to the DiT's condition: a position table and a gated MLP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wemmu.recipes.wemmu.config import Bridge


def _check_fits(side: int, height: int, width: int) -> None:
    if max(height, width) > side:
        raise ValueError(f"a grid of {height} x {width} tokens does not fit recipe.bridge.position_table = {side}")


def center_crop(table: Tensor, height: int, width: int) -> Tensor:
    """Return the central [height, width, D] of a table [side, side, D].

    Grids of different sizes share the centre of the table, so what a low resolution trains serves a higher one.

    Raises:
        ValueError: if the grid is larger than the table.
    """
    side = table.shape[0]
    _check_fits(side, height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return table[top : top + height, left : left + width]


def span(table: Tensor, height: int, width: int) -> Tensor:
    """Return entries [height, width, D] that span a table [side, side, D]: the entry at the centre of each grid cell.

    Raises:
        ValueError: if the grid is larger than the table.
    """
    side = table.shape[0]
    _check_fits(side, height, width)
    rows, columns = ((2 * torch.arange(n, device=table.device) + 1) * side // (2 * n) for n in (height, width))
    return table[rows[:, None], columns]


class PositionMLP(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x), x = state + P[row, column]; width D -> caption channels.

    States of several layers are combined as `config.states` says; P is added to the last one's, or to their mean.
    """

    def __init__(self, config: Bridge, width: int, caption_channels: int):
        super().__init__()
        self.states, side = config.states, config.position_table
        self.crop = {"centre": center_crop, "span": span}[config.position_crop]
        self.table = nn.Parameter(config.position_std * torch.randn(side, side, width))
        inputs = width * (self.states.layers if self.states.combine == "stack" else 1)
        self.gate = nn.Linear(inputs, caption_channels, bias=False)
        self.up = nn.Linear(inputs, caption_channels, bias=False)
        self.down = nn.Linear(caption_channels, caption_channels, bias=False)
        self.router = nn.Linear(width, self.states.layers) if self.states.combine == "route" else None

    def forward(self, states: Tensor, height: int, width: int) -> Tensor:
        """Map states [B, h * w, layers, D], the last layer's last, to [B, h * w, caption channels]."""
        if self.states.normalise:
            states = F.rms_norm(states, states.shape[-1:], eps=1e-6)
        if self.router is not None:
            weights = self.router(states[..., -1, :]).softmax(-1)
            states = (weights[..., None] * states).sum(-2, keepdim=True)
        positions = self.crop(self.table, height, width).flatten(0, 1)
        x = torch.cat([states[..., :-1, :].flatten(-2), states[..., -1, :] + positions], dim=-1)
        return self.down(F.silu(self.gate(x)) * self.up(x))
