"""The mathematics of GRPO: advantages by hand, gradients of the clipped loss by autograd, k3 by enumeration."""

import math

import pytest
import torch
from torch import Tensor

from wemmu.objectives.grpo import advantages, aggregate, clipped, kl_k3, surrogate

TINY = 1e-12
RAMP = torch.tensor([[1.0, 2, 3, 4]])


@pytest.mark.parametrize(
    ("std", "far", "near"), [("unbiased", 1.161895, 0.387298), ("population", 1.341641, 0.447214)], ids=str
)
def test_advantages_by_hand(std: str, far: float, near: float) -> None:
    found = advantages(RAMP, "group", std, TINY)
    assert found[0].tolist() == pytest.approx([-far, -near, near, far], abs=1e-5)


@pytest.mark.parametrize(("std", "bound"), [("unbiased", 1.5), ("population", math.sqrt(3))], ids=str)
def test_one_winner_of_four_has_the_largest_advantage_there_is(std: str, bound: float) -> None:
    winner = torch.tensor([[0.0, 0, 0, 1]])
    assert advantages(winner, "group", std, TINY)[0, 3] == pytest.approx(bound, abs=1e-5)
    default = advantages(winner, "group", std)[0, 3]
    assert default == pytest.approx({"unbiased": 1.4997, "population": 1.7317}[std], abs=5e-5)


def test_advantages_ignore_shift_and_scale_and_follow_a_permutation() -> None:
    rewards = torch.rand(5, 4, generator=torch.Generator().manual_seed(0))
    found = advantages(rewards, "group", epsilon=TINY)
    assert torch.allclose(advantages(rewards * 7 + 3, "group", epsilon=TINY), found, atol=1e-5)
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(advantages(rewards[:, order], "group", epsilon=TINY), found[:, order])
    assert torch.allclose(found.mean(1), torch.zeros(5), atol=1e-6)


def test_scales() -> None:
    rewards = torch.tensor([[0.0, 2], [0, 4]])
    assert advantages(rewards, "none").tolist() == [[-1, 1], [-2, 2]]
    # About the mean 1.5 of the batch: 2.25 + 0.25 + 2.25 + 6.25 = 11.
    found = advantages(rewards, "batch", "population", TINY)
    assert found[1, 1] == pytest.approx(2 / math.sqrt(11 / 4), abs=1e-6)
    assert advantages(rewards, "batch", "unbiased", TINY)[1, 1] == pytest.approx(2 / math.sqrt(11 / 3), abs=1e-6)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_constant_group_has_no_advantage_at_all(scale: str) -> None:
    """Exactly: a rounded mean divided by epsilon would still move the weights."""
    rewards = torch.tensor([[0.1] * 7, [0.3] * 7])
    assert not advantages(rewards, scale).any()
    rewards[0, 3] = 0.7
    found = advantages(rewards, scale)
    assert found[0].all()
    assert not found[1].any()


def test_a_missing_reward_counts_for_nothing() -> None:
    found = advantages(torch.tensor([[1.0, 2, torch.nan, 3], [torch.nan] * 4]), "group", epsilon=TINY)
    assert found[0].tolist() == pytest.approx([-1, 0, 0, 1], abs=1e-6)
    assert not found[1].any()


def test_a_group_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        advantages(torch.ones(3, 1), "group")


LOW, HIGH = 0.2, 0.4


def gradient(ratio: float, advantage: float, delta: float | None = None) -> float:
    """d loss / d logp."""
    logp = torch.tensor([[math.log(ratio)]], requires_grad=True)
    surrogate(logp, torch.zeros(1, 1), torch.tensor([advantage]), LOW, HIGH, delta).sum().backward()
    return float(logp.grad)


@pytest.mark.parametrize("advantage", [1.5, -1.5])
@pytest.mark.parametrize("ratio", [0.5, 0.7999, 0.85, 1.0, 1.3, 1.41, 3.0])
def test_the_gradient_is_zero_only_where_the_clip_protects(ratio: float, advantage: float) -> None:
    protected = (advantage > 0 and ratio > 1 + HIGH) or (advantage < 0 and ratio < 1 - LOW)
    assert gradient(ratio, advantage) == pytest.approx(0.0 if protected else -advantage * ratio, rel=1e-5)
    logp = torch.tensor([[math.log(ratio)]])
    low, high = clipped(logp, torch.zeros(1, 1), torch.tensor([advantage]), LOW, HIGH)
    assert bool(low | high) == protected
    assert bool(low) == (protected and advantage < 0)


def test_delta_bounds_what_a_negative_advantage_can_do() -> None:
    assert gradient(3.0, -1.0) == pytest.approx(3.0)
    assert gradient(3.0, -1.0, delta=2.0) == 0
    assert gradient(1.7, -1.0, delta=2.0) == pytest.approx(1.7)


def test_a_first_update_has_a_loss_of_zero_and_a_gradient() -> None:
    logp = torch.randn(4, 5, requires_grad=True)
    found = surrogate(logp, logp.detach(), advantages(RAMP, "group")[0], 0.2, 0.2)
    assert abs(float(found.detach().mean())) < 1e-6
    found.sum().backward()
    assert torch.allclose(logp.grad, -advantages(RAMP, "group")[0][:, None].expand(4, 5))


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


def test_k3_is_the_divergence_on_average_and_never_negative() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    p, q = a.log_softmax(0), b.log_softmax(0)
    each = kl_k3(p, q)
    assert (each >= 0).all()
    assert not kl_k3(p, p).any()
    assert float((p.exp() * each).sum()) == pytest.approx(float(kl(p.exp(), q.exp())), rel=1e-10)


def test_the_gradient_of_k3_on_own_samples_is_that_of_the_reverse_divergence() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 7, generator=generator, dtype=torch.float64)
    a.requires_grad_()
    p, q = a.log_softmax(0), b.log_softmax(0)
    (ours,) = torch.autograd.grad((p.detach().exp() * kl_k3(p, q)).sum(), a, retain_graph=True)
    (reverse,) = torch.autograd.grad(kl(q.exp(), p.exp()), a, retain_graph=True)
    (forward,) = torch.autograd.grad(kl(p.exp(), q.exp()), a)
    assert torch.allclose(ours, reverse)
    assert not torch.allclose(ours, forward, rtol=0.1)


EACH = torch.tensor([[1.0, 2, 3], [10, 99, 99]])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()


@pytest.mark.parametrize(("kind", "loss"), [("grpo", (2 + 10) / 2), ("dr_grpo", 16 / (2 * 8)), ("dapo", 16 / 4)])
def test_aggregates_of_a_ragged_batch_by_hand(kind: str, loss: float) -> None:
    assert float(aggregate(EACH, MASK, kind, limit=8, mean_length=4 / 2).mean()) == pytest.approx(loss)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("parts", [2, 8])
def test_parts_of_a_batch_add_up_to_it(kind: str, parts: int) -> None:
    """Micro-batches, or ranks: with the mean length of the whole batch known before."""
    generator = torch.Generator().manual_seed(3)
    each = torch.randn(8, 6, generator=generator)
    mask = torch.arange(6) < torch.randint(1, 7, (8, 1), generator=generator)
    mean_length = float(mask.sum() / 8)
    whole = aggregate(each, mask, kind, 6, mean_length).mean()
    pieces = [
        aggregate(e, m, kind, 6, mean_length).sum() / 8
        for e, m in zip(each.chunk(parts), mask.chunk(parts), strict=True)
    ]
    assert torch.allclose(sum(pieces), whole, rtol=1e-5)
