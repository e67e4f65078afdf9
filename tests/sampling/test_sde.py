"""Stochastic steps: the published formulas, the right marginals, scores and divergences of normal distributions."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from wemmu.config.objectives import SDE
from wemmu.objectives.flow_grpo import divergence, log_probability
from wemmu.objectives.grpo import advantages, surrogate
from wemmu.sampling.sde import sample, transition
from wemmu.sampling.solvers import euler, times

KINDS: tuple[SDE, ...] = ("flow", "constant", "cps")
TRUE_STD = 0.5


def field(x: Tensor, t: Tensor) -> Tensor:
    """E[eps - x_0 | x_t] of data that is normal with `TRUE_STD`."""
    t = t.view(-1, *[1] * (x.dim() - 1))
    return (t - (1 - t) * TRUE_STD**2) / ((1 - t) ** 2 * TRUE_STD**2 + t**2) * x


def reached(kind: SDE, steps: int, level: float) -> float:
    """The standard deviation at t = 0, exactly: every step is linear in x."""
    one, variance = torch.ones(1, 1, dtype=torch.float64), 1.0
    for t, t_next in pairwise(torch.linspace(1, 0, steps + 1, dtype=torch.float64).tolist()):
        mean, std = transition(kind, field(one, torch.tensor([t])), one, t, t_next, level)
        variance = float(mean) ** 2 * variance + std**2
    return math.sqrt(variance)


# Standard deviations after 10, 40, 200 and 1000 steps, measured apart from this code on samples, hence the tolerance.
REACHED = [
    ("flow", 0.0, (0.431, 0.482, 0.498, 0.500)),
    ("flow", 0.7, (0.479, 0.497, 0.501, 0.501)),
    ("constant", 0.3, (0.446, 0.490, 0.495)),
    ("cps", 0.8, (0.352, 0.388, 0.399, 0.402)),
]


@pytest.mark.parametrize(("kind", "level", "expected"), REACHED, ids=str)
def test_the_marginal_is_the_flows_but_for_cps(kind: SDE, level: float, expected: tuple[float, ...]) -> None:
    found = [reached(kind, steps, level) for steps in (10, 40, 200, 1000)]
    assert found[: len(expected)] == pytest.approx(expected, abs=0.006)
    assert (abs(found[2] - TRUE_STD) < 0.02 * TRUE_STD) == (kind != "cps")


def test_a_sampled_path_has_that_marginal_and_the_ode_elsewhere() -> None:
    x_1, ts = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0)), times(40, 1.0)
    drawn = [torch.randn(20_000, 1, generator=torch.Generator().manual_seed(i + 1)) for i in range(40)]
    whole = sample("flow", field, x_1, ts, range(40), 0.7, lambda i: drawn[i])
    assert float(whole.x.std()) == pytest.approx(reached("flow", 40, 0.7), rel=0.02)
    few = sample("flow", field, x_1, ts, range(2, 5), 0.7, lambda i: drawn[i])
    assert few.states.shape == (20_000, 4, 1)
    assert torch.allclose(few.states[:, 0], euler(field, x_1, ts[:3]))
    assert torch.allclose(euler(field, few.states[:, -1], ts[5:]), few.x)


@pytest.mark.parametrize("kind", KINDS)
def test_without_noise_every_kind_is_euler(kind: SDE) -> None:
    x, v = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).unbind()
    for t, t_next in ((1.0, 0.9), (0.5, 0.4), (0.1, 0.0)):
        mean, std = transition(kind, v, x, t, t_next, 0.0)
        assert std == 0
        assert torch.allclose(mean, x + (t_next - t) * v, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_time_are_finite(kind: SDE) -> None:
    x, v = torch.ones(1, 4), torch.full((1, 4), 0.3)
    for t, t_next in ((1.0, 0.98), (1e-3, 0.0), (1e-6, 0.0)):
        mean, std = transition(kind, v, x, t, t_next, 0.7)
        assert mean.isfinite().all()
        assert math.isfinite(std)
        assert std >= 0


def test_the_first_step_of_flow_takes_the_next_time_where_it_would_divide_by_zero() -> None:
    _, std = transition("flow", torch.zeros(1, 1), torch.zeros(1, 1), 1.0, 0.9, 0.7)
    assert std == pytest.approx(0.7 * math.sqrt(1 / 0.1) * math.sqrt(0.1))


def test_a_flow_step_by_hand() -> None:
    """t = .5, dt = -.1, a = .7: s = .7, mean = x + (v + .49 (x + .5 v)) dt."""
    mean, std = transition("flow", torch.tensor([[2.0]]), torch.tensor([[1.0]]), 0.5, 0.4, 0.7)
    assert float(mean) == pytest.approx(1 - 0.1 * (2 + 0.49 * 2))
    assert std == pytest.approx(0.7 * math.sqrt(0.1))


def test_a_score_is_the_normal_distributions_mean_over_elements() -> None:
    x, mean = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).unbind()
    expected = Normal(mean, 0.3).log_prob(x).flatten(1).mean(1)
    assert torch.allclose(log_probability(x, mean, 0.3), expected, atol=1e-5)
    assert log_probability(x.bfloat16(), mean.bfloat16(), 0.3).dtype == torch.float32


@pytest.mark.parametrize("kind", ["flow", "constant"])
@pytest.mark.parametrize(("t", "t_next"), [(0.9, 0.8), (0.5, 0.45), (0.2, 0.0)])
def test_the_divergence_is_the_normal_distributions_and_the_closed_form(kind: SDE, t: float, t_next: float) -> None:
    x, v, other = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1)).unbind()
    (mean, std), (reference, _) = (transition(kind, one, x, t, t_next, 0.7) for one in (v, other))
    found = divergence(mean, reference, std)
    assert torch.allclose(found, kl_divergence(Normal(mean, std), Normal(reference, std)).mean(1), rtol=1e-4)
    s, dt = std / math.sqrt(t - t_next), t - t_next
    closed = dt / 2 * (s * (1 - t) / (2 * t) + 1 / s) ** 2 * (v - other).square().mean(1)
    assert torch.allclose(found, closed, rtol=1e-4)


def test_the_gradient_of_the_loss_is_that_of_the_score_weighted_by_the_advantage() -> None:
    """On policy: d loss / d v = -A (x' - mean) / std^2 * d mean / d v, a mean over elements."""
    x, v, noise = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(2)).unbind()
    v.requires_grad_(True)
    mean, std = transition("flow", v, x, 0.8, 0.7, 0.7)
    after = (mean + std * noise).detach()
    advantage = advantages(torch.tensor([[1.0, 2, 4, 8]]), "group")[0]
    logp = log_probability(after, mean, std)
    surrogate(logp[:, None], logp.detach()[:, None], advantage, 1e-4, 1e-4).sum().backward()
    s = 0.7 * math.sqrt(0.8 / 0.2)
    slope = -0.1 * (1 + s**2 / (2 * 0.8) * 0.2)
    expected = -advantage[:, None] * noise / std * slope / 6
    assert torch.allclose(v.grad, expected, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_rewarded_paths_move_a_policy_to_what_is_rewarded() -> None:
    """A policy of one number, the shift of its velocity: stochastic steps find the shift that a reward asks for."""
    ts, window, generator = times(10, 1.0), range(2), torch.Generator().manual_seed(3)
    shift = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.Adam([shift], 0.05)
    ends = []
    for _ in range(80):
        x_1 = torch.randn(8, 1, 16, generator=generator).expand(-1, 8, -1).flatten(0, 1)
        drawn = [torch.randn(x_1.shape, generator=generator) for _ in window]
        path = sample("flow", lambda x, t: field(x, t) + shift, x_1, ts, window, 0.7, drawn.__getitem__)
        rewards = -(path.x.mean(1) - 1).square().unflatten(0, (8, 8))
        advantage = advantages(rewards, "group").flatten()
        with torch.enable_grad():
            scores = []
            for i in window:
                x = path.states[:, i]
                mean, std = transition("flow", field(x, ts[i].expand(64)) + shift, x, *ts[i : i + 2].tolist(), 0.7)
                scores.append(log_probability(path.states[:, i + 1], mean, std))
            logp = torch.stack(scores, 1)
            optimizer.zero_grad()
            surrogate(logp, logp.detach(), advantage, 1e-4, 1e-4).mean().backward()
        optimizer.step()
        ends.append(float(rewards.mean()))
    assert ends[0] < -0.9
    assert max(ends[-10:]) > -0.2
