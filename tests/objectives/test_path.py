"""The path from data to noise and the distribution of its times."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from wemmu.config.objectives import TimeSampling
from wemmu.objectives.path import sample_path, sample_time, shift_time

SHIFTS = st.floats(0.1, 10)


def normals(n: int) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_the_path_runs_from_data_to_noise_at_its_constant_velocity():
    x_0, eps = torch.randn(2, 3, 4, 2, 2)
    start, end = (sample_path(x_0, eps, torch.full((3,), t)) for t in (0.0, 1.0))
    assert torch.equal(start.x_t, x_0)
    assert torch.equal(end.x_t, eps)
    torch.testing.assert_close(end.x_t - start.x_t, start.v)
    half, later = (sample_path(x_0, eps, torch.full((3,), t)).x_t for t in (0.5, 0.75))
    torch.testing.assert_close((later - half) / 0.25, start.v)


def test_each_sample_has_its_own_time():
    x_t = sample_path(torch.zeros(2, 1, 2, 2), torch.ones(2, 1, 2, 2), torch.tensor([0.25, 0.75])).x_t
    assert x_t.flatten(1).tolist() == [[0.25] * 4, [0.75] * 4]


@given(SHIFTS)
def test_shift_keeps_the_ends_and_the_order_and_is_undone_by_its_reciprocal(shift: float):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    shifted = shift_time(t, shift)
    assert shifted[0] == 0
    assert math.isclose(float(shifted[-1]), 1)
    assert (shifted.diff() > 0).all()
    torch.testing.assert_close(shift_time(shifted, 1 / shift), t)
    # Above one it moves towards noise.
    assert float(shift_time(torch.tensor(0.5), 3.0)) == 0.75


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.0, 1.0, 3.0), (-0.5, 0.7, 2.0)])
def test_logit_normal_times_are_distributed_as_the_formula_says(mean: float, std: float, shift: float):
    config = TimeSampling(mean=mean, std=std, shift=shift, reference_resolution=512)
    t = sample_time(config, 512, normals(20_000))
    assert ((t > 0) & (t < 1)).all()

    def cdf(t):
        unshifted = t / (shift - (shift - 1) * t)
        return stats.norm.cdf((stats.logistic.ppf(unshifted) - mean) / std)

    assert stats.kstest(t.numpy(), cdf).pvalue > 0.01
    # Quantiles pass through monotone maps: the median is the shifted sigmoid of the mean.
    odds = shift * math.exp(mean)
    assert abs(float(t.median()) - odds / (1 + odds)) < 0.01


def test_uniform_times_are_uniform_and_shifted_too():
    plain, shifted = (sample_time(TimeSampling(kind="uniform", shift=s), 1024, normals(20_000)) for s in (1.0, 3.0))
    assert stats.kstest(plain.numpy(), "uniform").pvalue > 0.01
    assert abs(float(shifted.median()) - 0.75) < 0.01


def test_the_shift_follows_the_resolution():
    assert TimeSampling(shift=3.0).shift_at(1024) == 3.0
    assert TimeSampling(shift=3.0).shift_at(512) == 1.5
    assert TimeSampling(shift=3.0, resolution_exponent=0.0).shift_at(512) == 3.0
    assert TimeSampling(shift=3.0, resolution_exponent=2.0).shift_at(2048) == 12.0
    config = TimeSampling(shift=3.0)
    times = sample_time(config, 512, normals(10))
    torch.testing.assert_close(times, sample_time(TimeSampling(shift=1.5), 1024, normals(10)))
