"""Steps of a stochastic differential equation with the flow's marginals: a sampler with log-probabilities.

With dt = t_next - t < 0, standard normal noise z and the velocity v(x, t) of x_t = (1 - t) x_0 + t eps:

    flow, constant    x' = x + [v + s^2 / (2 t) (x + (1 - t) v)] dt + s sqrt(|dt|) z         (arXiv 2505.05470, eq. 9)
    cps               x' = (1 - t') x_0^ + sqrt(t'^2 - std^2) eps^ + std z, std = t' sin(a pi / 2)   (arXiv 2509.05952)

`flow`: s = a sqrt(t / (1 - t)); `constant`: s = a (arXiv 2505.07818). a is the noise level; with 0
all are Euler's step.
`cps` keeps the noise level of x_t, but not the marginals. Everything is computed in float32 or what x has above it.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from wemmu.config.objectives import SDE
from wemmu.timesteps import VelocityField


class Transition(NamedTuple):
    """The normal distribution of the next x: its mean [N, ...], and the standard deviation of every element."""

    mean: Tensor
    std: float


class Window(NamedTuple):
    """The end of a path [N, ...], and x at each stochastic step and after the last one, [N, W + 1, ...]."""

    x: Tensor
    states: Tensor


def transition(kind: SDE, velocity: Tensor, x: Tensor, t: float, t_next: float, level: float) -> Transition:
    """Return the distribution of x at t_next, given x [N, ...] at t and its velocity.

    At t = 1, where `flow` divides by 0, 1 - t_next takes the place of 1 - t in s.
    """
    if kind == "cps":
        std = t_next * math.sin(level * math.pi / 2)
        x_0, eps = x - t * velocity, x + (1 - t) * velocity
        return Transition((1 - t_next) * x_0 + math.sqrt(t_next**2 - std**2) * eps, std)
    dt = t_next - t
    s = level if kind == "constant" else level * math.sqrt(t / (1 - (t if t < 1 else t_next)))
    drift = velocity + s**2 / (2 * t) * (x + (1 - t) * velocity)
    return Transition(x + drift * dt, s * math.sqrt(-dt))


def sample(
    kind: SDE,
    velocity: VelocityField,
    x: Tensor,
    ts: Tensor,
    window: range,
    level: float,
    noise: Callable[[int], Tensor],
) -> Window:
    """Follow the flow from ts[0] to ts[-1]: stochastic steps in the window, Euler's elsewhere.

    x: [N, ...] at ts[0]. window: indices of steps, of which there are len(ts) - 1. noise: index of a step -> standard
    normal numbers of x's shape.
    """
    states = []
    for i, (t, t_next) in enumerate(pairwise(ts.tolist())):
        v = velocity(x, x.new_full((len(x),), t))
        if i not in window:
            x = x + (t_next - t) * v
            continue
        states.append(x)
        mean, std = transition(kind, v, x, t, t_next, level)
        x = mean + std * noise(i)
        if i == window[-1]:
            states.append(x)
    return Window(x, torch.stack(states, 1))
