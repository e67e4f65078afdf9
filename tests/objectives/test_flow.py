"""The objectives, against values worked out by hand."""

import torch

from wemmu.objectives.flow import contrastive_flow_matching, flow_matching
from wemmu.objectives.path import sample_path

# Two samples of two elements: v = eps - x_0 is [-1, 3] and [2, 0].
X_0 = torch.tensor([[1.0, -1.0], [3.0, 4.0]])
EPS = torch.tensor([[0.0, 2.0], [5.0, 4.0]])
T = torch.tensor([0.25, 0.5])
V = sample_path(X_0, EPS, T).v
ONES = torch.ones(2, 2)
PAIRED = torch.tensor([True, True])


def test_flow_matching_is_the_mean_square_distance_to_the_velocity():
    # (1+1)^2, (1-3)^2 and (1-2)^2, (1-0)^2
    assert flow_matching(ONES, V).tolist() == [4.0, 1.0]


def test_the_true_velocity_has_no_loss():
    assert flow_matching(EPS - X_0, V).tolist() == [0.0, 0.0]


def test_contrastive_subtracts_the_distance_to_the_other_samples_velocity():
    losses = contrastive_flow_matching(ONES, V, V.flip(0), PAIRED, weight=0.25)
    assert losses.tolist() == [4.0 - 0.25 * 1.0, 1.0 - 0.25 * 4.0]


def test_contrastive_of_weight_zero_is_flow_matching():
    assert torch.equal(contrastive_flow_matching(ONES, V, V.flip(0), PAIRED, weight=0.0), flow_matching(ONES, V))


def test_without_a_partner_only_the_distance_to_the_own_velocity_counts():
    losses = contrastive_flow_matching(ONES, V, V.flip(0), torch.tensor([False, True]), weight=0.25)
    assert losses.tolist() == [4.0, 1.0 - 0.25 * 4.0]


def test_half_precision_predictions_are_compared_in_float32():
    assert flow_matching(ONES.bfloat16(), V).dtype == torch.float32
