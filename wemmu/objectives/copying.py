"""Whether an edit follows its instruction or copies its input (the paper's collapse), without a scorer."""

import torch
from torch import Tensor

# An input that differs from the target by less than this share of the target's energy tells nothing.
LEAST_CHANGE = 1e-3
# From here on an estimate is nearer to the input than to the middle between input and target.
COPIED = 0.75


def copy_position(estimate: Tensor, target: Tensor, inputs: Tensor) -> Tensor:
    """Return where an estimate of x_0 lies on the way from the target (0) to the input (1), [B]; NaN if they are alike.

    It is <x - target, input - target> / || input - target ||^2: the coordinate of the estimate's projection. Blur and
    errors off the way do not count. A model that knows neither image lies at 0.5 on average. Of several inputs the
    nearest counts.

    estimate, target: latents [B, C, h, w]; inputs: [B, N, C, h, w].
    """
    way = (inputs - target[:, None]).float().flatten(2)  # [B, N, D]
    offset = (estimate - target).float().flatten(1)[:, None]
    square = way.square().sum(-1)
    known = square > LEAST_CHANGE * target.float().flatten(1).square().sum(-1, keepdim=True)
    position = ((offset * way).sum(-1) / square.clamp(min=1e-12)).masked_fill(~known, -torch.inf).amax(1)
    return position.masked_fill(~known.any(1), torch.nan)
