"""The objectives, against values worked out by hand."""

import math

import pytest
import torch

from wemmu.config.objectives import LossWeighting
from wemmu.objectives.flow import contrastive_flow_matching, square_error, time_weight
from wemmu.objectives.path import sample_path
from wemmu.recipes.wemmu.config import FlowMatching

# Two samples of two elements: v = eps - x_0 is [-1, 3] and [2, 0].
X_0 = torch.tensor([[1.0, -1.0], [3.0, 4.0]])
EPS = torch.tensor([[0.0, 2.0], [5.0, 4.0]])
T = torch.tensor([0.25, 0.5])
V = sample_path(X_0, EPS, T).v
ONES = torch.ones(2, 2)


def test_flow_matching_is_the_mean_square_distance_to_the_velocity_in_float32():
    # (1+1)^2, (1-3)^2 and (1-2)^2, (1-0)^2
    assert square_error(ONES, V).tolist() == [4.0, 1.0]
    assert square_error(EPS - X_0, V).tolist() == [0.0, 0.0]
    assert square_error(ONES.bfloat16(), V).dtype == torch.float32


@pytest.mark.parametrize(
    ("paired", "weight", "losses"),
    [
        ([True, True], 0.25, [4.0 - 0.25 * 1.0, 1.0 - 0.25 * 4.0]),
        ([True, True], 0.0, [4.0, 1.0]),
        ([False, True], 0.25, [4.0, 1.0 - 0.25 * 4.0]),
    ],
)
def test_contrastive_subtracts_the_distance_to_the_partners_velocity(paired: list, weight: float, losses: list):
    assert contrastive_flow_matching(ONES, V, V.flip(0), torch.tensor(paired), weight).tolist() == losses


# At t = 1/4, 1/2 and 9/10; the signal-to-noise ratio there is 9, 1 and 1/81.
WEIGHTS = {
    "uniform": [1.0, 1.0, 1.0],
    "sigma_sqrt": [16.0, 4.0, 1 / 0.81],
    "cosmap": [2 / (math.pi * 0.625), 4 / math.pi, 2 / (math.pi * 0.82)],
    # On the error of x_0 min(SNR, 5) = 5, 1, 1/81; times t^2 on that of v.
    "min_snr": [5 / 16, 1 / 4, 0.01],
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_the_weight_over_time_is_the_formulas(kind: str):
    weights = time_weight(LossWeighting(kind=kind), torch.tensor([0.25, 0.5, 0.9]))
    assert weights.tolist() == pytest.approx(WEIGHTS[kind], rel=1e-5)


def test_min_snr_takes_its_bound_from_gamma():
    assert time_weight(LossWeighting(kind="min_snr", gamma=0.5), T).tolist() == pytest.approx([0.5 / 16, 0.5 / 4])


def test_by_default_every_time_counts_alike():
    assert FlowMatching().weighting.kind == "uniform"
