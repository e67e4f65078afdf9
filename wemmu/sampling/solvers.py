"""Solvers of dx/dt = v(x, t) from noise (t = 1) to data (t = 0): plain functions with one signature."""

from collections.abc import Callable

import torch
from torch import Tensor

from wemmu.timesteps import VelocityField, shift_time

Solver = Callable[[VelocityField, Tensor, Tensor], Tensor]


def times(steps: int, shift: float) -> Tensor:
    """`steps` + 1 times from 1 to 0, evenly spaced and then shifted as in training."""
    return shift_time(torch.linspace(1, 0, steps + 1), shift)


def euler(velocity: VelocityField, x: Tensor, ts: Tensor) -> Tensor:
    """First order: one evaluation a step. x [B, ...] at ts[0] -> x at ts[-1]."""
    for t, t_next in zip(ts[:-1].tolist(), ts[1:].tolist(), strict=True):
        x = x + (t_next - t) * velocity(x, x.new_full((len(x),), t))
    return x


def heun(velocity: VelocityField, x: Tensor, ts: Tensor) -> Tensor:
    """Second order: two evaluations a step, one for the last."""
    for t, t_next in zip(ts[:-1].tolist(), ts[1:].tolist(), strict=True):
        v = velocity(x, x.new_full((len(x),), t))
        ahead = x + (t_next - t) * v
        if t_next > 0:
            v = (v + velocity(ahead, x.new_full((len(x),), t_next))) / 2
        x = x + (t_next - t) * v
    return x


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun}
