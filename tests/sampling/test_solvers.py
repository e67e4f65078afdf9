"""Solvers follow known fields to known ends, at their order."""

import math
from itertools import pairwise
from typing import get_args

import pytest
import torch
from torch import Tensor

from wemmu.config.schema import SolverName
from wemmu.objectives.flow import square_error
from wemmu.objectives.reconstruction import add_noise
from wemmu.sampling.solvers import SOLVERS, Solver, ddim, times
from wemmu.timesteps import alpha_bar


@pytest.fixture(params=SOLVERS)
def solver(request: pytest.FixtureRequest) -> Solver:
    return SOLVERS[request.param]


def error(solver: Solver, steps: int, shift: float = 1.0) -> float:
    """Distance from the end of dx/dt = x + t, which is x = C e^t - t - 1."""
    x_1 = torch.tensor([[2.0]], dtype=torch.float64)
    exact = (2.0 + 2) / math.e - 1
    x_0 = solver(lambda x, t: x + t[:, None], x_1, times(steps, shift).double())
    return abs(float(x_0) - exact)


def test_a_straight_path_is_followed_exactly_in_one_step(solver: Solver):
    x_0, eps = torch.arange(6.0).reshape(2, 3), torch.tensor([[4.0, 0, -3], [1, 1, 8]])
    assert torch.equal(solver(lambda x, t: eps - x_0, eps, times(1, 3.0)), x_0)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2)])
def test_the_error_shrinks_at_the_solvers_order(name: str, order: int, shift: float):
    errors = [error(SOLVERS[name], n, shift) for n in (40, 80, 160)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.15)


def test_the_config_names_every_solver():
    assert get_args(SolverName) == tuple(SOLVERS)


def test_every_sample_is_told_the_time_of_the_step(solver: Solver):
    seen: list[Tensor] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return torch.zeros_like(x)

    ts = times(4, 2.0)
    solver(field, torch.zeros(3, 2), ts)
    assert all(t.shape == (3,) and (t == t[0]).all() for t in seen)
    assert sorted({float(t[0]) for t in seen}, reverse=True) == pytest.approx(ts[:-1].tolist())


@pytest.mark.parametrize(("name", "evaluations"), [("euler", 5), ("heun", 9)])
def test_evaluations_are_as_many_as_promised_and_none_is_at_the_data(name: str, evaluations: int):
    seen: list[float] = []

    def field(x: Tensor, t: Tensor) -> Tensor:
        seen.append(float(t[0]))
        return x

    SOLVERS[name](field, torch.ones(1, 1), times(5, 1.0))
    assert len(seen) == evaluations
    assert min(seen) > 0


@pytest.mark.parametrize("shift", [0.5, 1.0, 4.0])
def test_times_fall_from_noise_to_data(shift: float):
    ts = times(7, shift)
    assert len(ts) == 8
    assert (ts[0], ts[-1]) == (1, 0)
    assert (ts.diff() < 0).all()


def test_times_are_shifted_as_in_training():
    torch.testing.assert_close(times(4, 3.0), torch.tensor([1, 0.9, 0.75, 0.5, 0.0]))


def test_ddim_with_the_exact_noise_of_gaussian_data_returns_that_data():
    """Of z_0 ~ N(0, 1), E[eps | z_t] = sqrt(1 - abar_t) z_t, whose error is abar_t; over all t 0.4956."""
    generator = torch.Generator().manual_seed(0)
    abar = alpha_bar(1000)

    def exact(z_t: Tensor, t: Tensor) -> Tensor:
        return (1 - abar[t]).sqrt().float()[:, None] * z_t

    z_0, eps = torch.randn(2, 20_000, 1, generator=generator)
    t = torch.randint(1000, (20_000,), generator=generator)
    error = square_error(exact(add_noise(z_0, eps, t, 1000), t), eps).mean()
    assert float(error) == pytest.approx(float(abar.mean()), abs=0.02)
    assert float(abar.mean()) == pytest.approx(0.4955775126, rel=1e-9)
    restored = ddim(exact, torch.randn(20_000, 1, generator=generator), 1000, steps=200)
    assert float(restored.mean()) == pytest.approx(0, abs=0.03)
    assert float(restored.var()) == pytest.approx(1, abs=0.05)
