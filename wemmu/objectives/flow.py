"""Conditional and contrastive flow matching: one loss per sample, from the predicted velocity."""

import math

import torch
from torch import Tensor

from wemmu.config.objectives import LossWeighting


def square_error(a: Tensor, b: Tensor) -> Tensor:
    """Compute || a - b ||^2 of two batches [B, ...], the mean over a sample's elements: [B], float32.

    Of a predicted velocity v_theta(x_t, t, y) and the path's, eps - x_0, this is flow matching.
    """
    return (a - b).float().square().flatten(1).mean(1)


def contrastive_flow_matching(
    predicted: Tensor, v: Tensor, v_negative: Tensor, paired: Tensor, weight: float
) -> Tensor:
    """Compute || v_theta - v+ ||^2 - lambda || v_theta - v- ||^2.

    v_negative: [B, ...], v- = eps' - x_0' of another sample; paired: bool [B], False where there is none and the second
    term is left out. weight: lambda. Returns [B].
    """
    return square_error(predicted, v) - weight * paired * square_error(predicted, v_negative)


def time_weight(config: LossWeighting, t: Tensor) -> Tensor:
    """Return the weight [B] of a sample's loss at its time t [B], where 1 is noise; see `LossWeighting`."""
    match config.kind:
        case "uniform":
            return torch.ones_like(t)
        case "sigma_sqrt":
            return t**-2
        case "cosmap":
            return 2 / (math.pi * (1 - 2 * t + 2 * t**2))
        case "min_snr":
            return torch.minimum((1 - t) ** 2, config.gamma * t**2)
