"""The probability path x_t = (1 - t) x_0 + t eps, its velocity, and the distribution of t."""

import torch
from torch import Tensor

from wemmu.config.objectives import TimeSampling
from wemmu.timesteps import shift_time
from wemmu.types import Flow


def sample_path(x_0: Tensor, eps: Tensor, t: Tensor) -> Flow:
    """Return the point of the straight path from data x_0 (t = 0) to noise eps (t = 1), and its velocity eps - x_0."""
    t_ = t.reshape(-1, *[1] * (x_0.ndim - 1))
    return Flow((1 - t_) * x_0 + t_ * eps, t, eps - x_0)


def sample_time(config: TimeSampling, resolution: int, normal: Tensor) -> Tensor:
    """Compute training times in (0, 1) from standard normal draws [B]."""
    match config.kind:
        case "logit_normal":
            t = torch.sigmoid(config.mean + config.std * normal)
        case "uniform":
            t = torch.special.ndtr(normal)
    return shift_time(t, config.shift_at(resolution))
