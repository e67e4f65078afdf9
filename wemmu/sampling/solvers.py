"""Solvers of dx/dt = v(x, t) from noise (t = 1) to data (t = 0): plain functions with one signature.

And `ddim`, for a head that predicts the noise.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from wemmu.timesteps import VelocityField, alpha_bar, shift_time


@dataclass(frozen=True)
class Step:
    """A step that a solver has made from time t to t_next: its index from 0, x [B, ...] at t_next, and the velocity."""

    index: int
    t: float
    t_next: float
    x: Tensor
    velocity: Tensor

    @property
    def estimate(self) -> Tensor:
        """x at t = 0 if the velocity stayed as it is: what the image looks like so far."""
        return self.x - self.t_next * self.velocity


# Called after each step; the solver continues from the x that it returns.
OnStep = Callable[[Step], Tensor]


def keep(step: Step) -> Tensor:
    return step.x


class Solver(Protocol):
    def __call__(self, velocity: VelocityField, x: Tensor, ts: Tensor, on_step: OnStep = keep) -> Tensor:
        """Integrate from x [B, ...] at ts[0] to x at ts[-1]."""


# Smallest share of signal abar_t at which the head predicts the noise. An error of the head counts
# sqrt((1 - abar_t) / abar_t) times in z_0: 32 times here, but 20290 times at the schedule's last step, where z_t tells
# nothing of z_0. That pure noise stands for z_t here costs abar_t / 2 = 0.0005 nats an element.
LEAST_SIGNAL = 1e-3


def times(steps: int, shift: float) -> Tensor:
    """Return `steps` + 1 times from 1 to 0, evenly spaced and then shifted as in training."""
    return shift_time(torch.linspace(1, 0, steps + 1), shift)


def euler(velocity: VelocityField, x: Tensor, ts: Tensor, on_step: OnStep = keep) -> Tensor:
    """Integrate with first order: one evaluation a step."""
    for i, (t, t_next) in enumerate(pairwise(ts.tolist())):
        v = velocity(x, x.new_full((len(x),), t))
        x = on_step(Step(i, t, t_next, x + (t_next - t) * v, v))
    return x


def heun(velocity: VelocityField, x: Tensor, ts: Tensor, on_step: OnStep = keep) -> Tensor:
    """Integrate with second order: two evaluations a step, one for the last."""
    for i, (t, t_next) in enumerate(pairwise(ts.tolist())):
        v = velocity(x, x.new_full((len(x),), t))
        ahead = x + (t_next - t) * v
        if t_next > 0:
            v = (v + velocity(ahead, x.new_full((len(x),), t_next))) / 2
        x = on_step(Step(i, t, t_next, x + (t_next - t) * v, v))
    return x


SOLVERS: dict[str, Solver] = {"euler": euler, "heun": heun}


def ddim(noise_in: Callable[[Tensor, Tensor], Tensor], z: Tensor, timesteps: int, steps: int) -> Tensor:
    """Integrate noise z [M, ...] to z_0 with a head eps(z_t, t) trained on `timesteps` steps of the cosine schedule.

    Deterministic DDIM on at most `steps` steps of the schedule, evenly spaced, the first being the last that holds
    `LEAST_SIGNAL`; from the lowest it goes to z_0 itself.
    """
    share = alpha_bar(timesteps)
    count = max(1, int((share >= LEAST_SIGNAL).sum()))
    ts = torch.linspace(count - 1, 0, min(steps, count) + 1)[:-1].round().long().unique().flip(0)
    for t, t_next in zip(ts.tolist(), [*ts[1:].tolist(), None], strict=True):
        now, then = float(share[t]), 1.0 if t_next is None else float(share[t_next])
        eps = noise_in(z, torch.full((len(z),), t, device=z.device))
        z_0 = (z - math.sqrt(1 - now) * eps) / math.sqrt(now)
        z = math.sqrt(then) * z_0 + math.sqrt(1 - then) * eps
    return z
