"""The objectives, against values worked out by hand and under permutations of the batch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wemmu.objectives.flow import contrastive_flow_matching, flow_matching, negatives

# Two samples of two elements: v = eps - x_0 is [-1, 3] and [2, 0].
X_0 = torch.tensor([[1.0, -1.0], [3.0, 4.0]])
EPS = torch.tensor([[0.0, 2.0], [5.0, 4.0]])
T = torch.tensor([0.25, 0.5])

BATCHES = st.lists(st.integers(0, 2**62), min_size=2, max_size=12, unique=True)


def ones(x_t: Tensor, t: Tensor) -> Tensor:
    return torch.ones_like(x_t)


def test_flow_matching_is_the_mean_square_distance_to_the_velocity():
    # (1+1)^2, (1-3)^2 and (1-2)^2, (1-0)^2
    assert flow_matching(ones, X_0, EPS, T).tolist() == [4.0, 1.0]


def test_the_field_is_evaluated_on_the_path_at_its_time():
    # x_t = [0.75, -0.25] and [4, 4]; plus t: [1, 0] and [4.5, 4.5]
    def field(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t + t[:, None]

    assert flow_matching(field, X_0, EPS, T).tolist() == [(2**2 + 3**2) / 2, (2.5**2 + 4.5**2) / 2]


def test_the_true_velocity_has_no_loss():
    assert flow_matching(lambda *_: EPS - X_0, X_0, EPS, T).tolist() == [0.0, 0.0]


def test_contrastive_subtracts_the_distance_to_the_other_samples_velocity():
    losses = contrastive_flow_matching(ones, X_0, EPS, T, torch.tensor([1, 0]), weight=0.25)
    assert losses.tolist() == [4.0 - 0.25 * 1.0, 1.0 - 0.25 * 4.0]


def test_contrastive_of_weight_zero_is_flow_matching():
    losses = contrastive_flow_matching(ones, X_0, EPS, T, torch.tensor([1, 0]), weight=0.0)
    assert torch.equal(losses, flow_matching(ones, X_0, EPS, T))


@given(BATCHES)
def test_a_negative_is_never_the_sample_itself_and_every_sample_is_one(ids: list[int]):
    partner = negatives(torch.tensor(ids)).tolist()
    assert all(b != p for b, p in enumerate(partner))
    assert sorted(partner) == list(range(len(ids)))


@given(BATCHES, st.randoms())
def test_the_choice_of_negatives_does_not_depend_on_the_order_of_the_batch(ids: list[int], rng):
    shuffled = rng.sample(ids, len(ids))
    partner_of = {ids[b]: ids[p] for b, p in enumerate(negatives(torch.tensor(ids)).tolist())}
    assert partner_of == {shuffled[b]: shuffled[p] for b, p in enumerate(negatives(torch.tensor(shuffled)).tolist())}


def test_a_sample_that_comes_twice_is_not_its_own_negative():
    assert negatives(torch.tensor([7, 3, 7, 9, 3])).tolist() == [3, 0, 3, 1, 0]
    assert negatives(torch.tensor([7, 7, 7])).tolist() == [0, 1, 2]


def test_without_a_negative_only_the_distance_to_the_own_velocity_counts():
    losses = contrastive_flow_matching(ones, X_0, EPS, T, torch.tensor([0, 0]), weight=0.25)
    assert losses.tolist() == [4.0, 1.0 - 0.25 * 4.0]


def test_a_batch_of_one_has_no_negative():
    with pytest.raises(ValueError, match="at least two"):
        negatives(torch.tensor([5]))


@pytest.mark.parametrize("kind", ["flow", "contrastive"])
def test_permuting_the_batch_permutes_the_losses(kind: str):
    g = torch.Generator().manual_seed(0)
    ids = torch.tensor([30, 10, 50, 20])
    x_0, eps = torch.randn(2, 4, 3, 2, 2, generator=g)
    t = torch.rand(4, generator=g)

    def losses(order: Tensor) -> Tensor:
        inputs = x_0[order], eps[order], t[order]

        def field(x_t: Tensor, t: Tensor) -> Tensor:
            return x_t.sin() + t[:, None, None, None]

        if kind == "flow":
            return flow_matching(field, *inputs)
        return contrastive_flow_matching(field, *inputs, negatives(ids[order]), 0.05)

    straight = losses(torch.arange(4))
    assert len(set(straight.tolist())) == 4
    for order in ([3, 2, 1, 0], [1, 2, 3, 0], [2, 0, 3, 1]):
        assert torch.equal(losses(torch.tensor(order)), straight[order])
