"""The paper's three guidance rules, as weights on the velocities of up to three branches.

A branch is the same request with less in it: nothing at all, the images without the words, or all of it. Every
rule is a sum of branches whose weights add up to one (paper, "Inference"):

    text to image       v = v_un + w (v_full - v_un)
    single-image edit   v = v_un + w_i (v_image - v_un) + w_t (v_full - v_image)
    multi-image edit    v = v_un + w (v_full - v_un)
"""

from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor

from wemmu.config.schema import Sampling
from wemmu.config.task import Task
from wemmu.timesteps import VelocityField
from wemmu.types import VelocityOf


class Branch(Enum):
    UNCONDITIONAL = "nothing"
    IMAGE = "the images without the words"
    FULL = "everything"


def wordless(task: Task) -> Branch:
    """Return the branch that differs from FULL only in its text or, if the task has no text, the empty branch.

    A negative prompt takes the place of its words.
    """
    return Branch.IMAGE if task is Task.EDIT else Branch.UNCONDITIONAL


def guidance_weights(task: Task, sampling: Sampling) -> dict[Branch, float]:
    """Return the weight of each branch, without branches of weight zero, so guidance 1 costs and changes nothing.

    Raises:
        ValueError: for a task that has no image to generate.
    """
    un, image, full = Branch.UNCONDITIONAL, Branch.IMAGE, Branch.FULL
    match task:
        case Task.UNCONDITIONAL:
            weights = {full: 1.0}
        case Task.T2I:
            weights = {un: 1 - sampling.t2i, full: sampling.t2i}
        case Task.RECONSTRUCTION:
            weights = {un: 1 - sampling.image, full: sampling.image}
        case Task.EDIT:
            w_i, w_t = sampling.image, sampling.instruction
            weights = {un: 1 - w_i, image: w_i - w_t, full: w_t}
        case Task.MULTI_EDIT:
            weights = {un: 1 - sampling.multi, full: sampling.multi}
        case _:
            raise ValueError(f"the task {task} has no image to generate")
    return {branch: weight for branch, weight in weights.items() if weight != 0}


def guided_velocity(velocity: VelocityOf, branches: Sequence[tuple[Tensor, float]]) -> VelocityField:
    """Return the weighted sum of the branches' velocities; one call of the DiT computes all.

    velocity: (x_t, t, states of the condition) -> velocity. branches: states [B, Q, C_y] and their weight.
    """
    n, states = len(branches), torch.cat([states for states, _ in branches])
    weights = torch.tensor([weight for _, weight in branches]).to(states.device, non_blocking=True)

    def summed(x: Tensor, t: Tensor) -> Tensor:
        v = velocity(x.repeat(n, *[1] * (x.dim() - 1)), t.repeat(n), states).unflatten(0, (n, -1))
        return (weights.view(n, *[1] * x.dim()) * v).sum(0)

    return summed
