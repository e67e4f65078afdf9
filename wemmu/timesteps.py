"""Timesteps, the same for training and sampling.

For a flow, t = 1 is noise and t = 0 is data; training and sampling use the same shift. For a denoising head, t counts
the steps of a cosine schedule.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

# v(x_t [B, ...], t [B]) -> [B, ...]; the condition is bound inside.
VelocityField = Callable[[Tensor, Tensor], Tensor]
# No step of the schedule removes more of the signal's power than this.
LARGEST_BETA = 0.999


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Compute s t / (1 + (s - 1) t), which moves weight towards noise for s > 1; 0 and 1 stay."""
    return shift * t / (1 + (shift - 1) * t)


@lru_cache
def alpha_bar(timesteps: int) -> Tensor:
    """Compute abar_t of the cosine schedule, float64 [timesteps]: the share of signal in z_t, falling in t.

    beta_t = min(1 - f((t + 1) / T) / f(t / T), 0.999), f(u) = cos^2((u + 0.008) / 1.008 * pi / 2).
    """
    f = [math.cos((t / timesteps + 0.008) / 1.008 * math.pi / 2) ** 2 for t in range(timesteps + 1)]
    betas = [min(1 - after / before, LARGEST_BETA) for before, after in pairwise(f)]
    return (1 - torch.tensor(betas, dtype=torch.float64)).cumprod(0)
