"""Guidance weights say what the paper's rules say."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wemmu.config.schema import Sampling
from wemmu.config.task import GENERATION_TASKS, Task
from wemmu.sampling.guidance import Branch, guidance_weights, guided_velocity

SCALES = st.builds(Sampling, **{name: st.floats(-2, 10) for name in ("t2i", "image", "instruction", "multi")})


def guided(task: Task, sampling: Sampling, v: dict[Branch, torch.Tensor]) -> torch.Tensor:
    return sum(weight * v[branch] for branch, weight in guidance_weights(task, sampling).items())


@given(SCALES)
def test_weights_sum_to_one(sampling: Sampling):
    for task in GENERATION_TASKS:
        assert sum(guidance_weights(task, sampling).values()) == pytest.approx(1)


@given(SCALES)
def test_weights_are_the_rules_of_the_paper(sampling: Sampling):
    un, image, full = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = {Branch.UNCONDITIONAL: un, Branch.IMAGE: image, Branch.FULL: full}
    rules = {
        Task.UNCONDITIONAL: full,
        Task.T2I: un + sampling.t2i * (full - un),
        Task.RECONSTRUCTION: un + sampling.image * (full - un),
        Task.EDIT: un + sampling.image * (image - un) + sampling.instruction * (full - image),
        Task.MULTI_EDIT: un + sampling.multi * (full - un),
    }
    assert rules.keys() == set(GENERATION_TASKS)
    for task, expected in rules.items():
        torch.testing.assert_close(guided(task, sampling, v), expected)


@pytest.mark.parametrize("task", GENERATION_TASKS)
def test_guidance_one_asks_for_the_full_branch_alone(task: Task):
    assert guidance_weights(task, Sampling(t2i=1, image=1, instruction=1, multi=1)) == {Branch.FULL: 1.0}


def test_defaults_are_the_papers():
    assert guidance_weights(Task.T2I, Sampling()) == {Branch.UNCONDITIONAL: -3.0, Branch.FULL: 4.0}
    edit = {Branch.UNCONDITIONAL: -1.0, Branch.IMAGE: -1.0, Branch.FULL: 3.0}
    assert guidance_weights(Task.EDIT, Sampling()) == edit
    assert guidance_weights(Task.MULTI_EDIT, Sampling()) == {Branch.UNCONDITIONAL: -2.0, Branch.FULL: 3.0}


def test_a_task_without_a_image_is_refused():
    with pytest.raises(ValueError, match="understanding has no image to generate"):
        guidance_weights(Task.UNDERSTANDING, Sampling())


def test_branches_are_asked_together_and_add_up_by_their_weights():
    """w v_full + (1 - w) v_empty is v_empty + w (v_full - v_empty)."""
    states, x = torch.randn(2, 3, 5, 4), torch.randn(3, 2, 4, 6)
    calls = []

    def velocity(x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        calls.append(len(x))
        return x * t[:, None, None, None] * condition.mean((1, 2))[:, None, None, None]

    t = torch.full((3,), 0.4)
    full, empty = (velocity(x, t, one) for one in states)
    calls.clear()
    both = guided_velocity(velocity, [(states[0], 2.5), (states[1], -1.5)])(x, t)
    assert torch.allclose(both, empty + 2.5 * (full - empty), atol=1e-6)
    assert calls == [6]
    assert torch.equal(guided_velocity(velocity, [(states[0], 1.0)])(x, t), full)
