"""ROSS's losses, against numbers computed by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from wemmu.objectives.flow import square_error
from wemmu.objectives.reconstruction import add_noise, alpha_bar, answer_cross_entropy, regression


def test_the_schedule_is_the_cosine_of_a_thousand_steps():
    abar = alpha_bar(1000)
    # f(u) = cos^2((u + 0.008) / 1.008 * pi / 2), the last beta cut off at 0.999.
    f = [math.cos((u / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in range(1001)]
    want = torch.tensor([f[t + 1] / f[0] for t in range(999)], dtype=torch.float64)
    assert torch.allclose(abar[:999], want, rtol=1e-10)
    assert abar[999].item() == pytest.approx(abar[998].item() * 0.001, rel=1e-10)
    assert (abar.diff() < 0).all()
    assert abar[[0, 500, 999]].tolist() == pytest.approx([0.9999587158, 0.4922851724, 2.428766907e-9], rel=1e-9)


def test_half_way_signal_and_noise_are_mixed_by_their_roots():
    one = torch.ones(2, 3, 1, 1)
    z_t = add_noise(one, one, torch.tensor([500, 999]), 1000)
    assert z_t[0].flatten().tolist() == pytest.approx([0.70163037 + 0.71254111] * 3, rel=1e-5)
    assert z_t[1].flatten().tolist() == pytest.approx([1.0] * 3, abs=1e-4)


def test_who_predicts_nothing_is_off_by_the_noise_and_who_repeats_z_t_by_the_signal():
    eps = torch.ones(2, 4, 2, 2)
    assert square_error(torch.zeros_like(eps), eps).tolist() == [1.0, 1.0]
    z_t = add_noise(torch.ones_like(eps), eps, torch.tensor([500, 500]), 1000)
    assert square_error(z_t, eps).tolist() == pytest.approx([0.41417148**2] * 2, rel=1e-4)


@pytest.mark.parametrize(
    ("metric", "loss"), [("mse", 2.5), ("smooth_l1", (0.5 + 1.5) / 2), ("cosine", 1 - 1 / math.sqrt(5))]
)
def test_a_metric_by_hand(metric, loss):
    predicted, target = torch.zeros(1, 2, 1, 1), torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)
    if metric == "cosine":
        predicted = torch.tensor([1.0, 0.0]).reshape(1, 2, 1, 1)
    assert regression(predicted, target, metric).tolist() == pytest.approx([loss], rel=1e-6)


def test_every_answer_weighs_the_same_however_long():
    logits, wanted = torch.randn(5, 7), torch.tensor([1, 2, 3, 4, 5])
    sample = torch.tensor([0, 0, 0, 0, 2])
    each = F.cross_entropy(logits, wanted, reduction="none")
    losses = answer_cross_entropy(logits, wanted, sample, 3)
    assert torch.allclose(losses, torch.stack([each[:4].mean(), torch.tensor(0.0), each[4]]))
