"""The heads of ROSS: how they begin, what reaches whom, and that they use what they are told."""

import pytest
import torch
from torch import Tensor

from tests.models.world import awake
from wemmu.objectives.flow import square_error
from wemmu.objectives.reconstruction import add_noise, regression
from wemmu.recipes.ross.config import Denoiser as DenoiserConfig
from wemmu.recipes.ross.heads import Denoiser, Regressor, _places

D, C, H, W = 12, 6, 2, 3
CONDITIONINGS = ("adaln_zero", "add")


def denoiser(conditioning: str, seed: int = 0) -> Denoiser:
    torch.manual_seed(seed)
    return Denoiser(DenoiserConfig(conditioning=conditioning, depth=2, width=16, heads=2), D, C)


def draw(images: int = 3, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(images, H * W, D, generator=generator)
    return torch.randn(images, C, H, W, generator=generator), torch.tensor([10, 500, 990][:images]), states


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_new_denoiser_predicts_nothing_and_is_off_by_one(conditioning):
    z_t, t, states = draw()
    predicted = denoiser(conditioning)(z_t, t, states)
    assert predicted.shape == z_t.shape
    assert not predicted.any()


@pytest.mark.parametrize(("conditioning", "silent"), [("adaln_zero", 2), ("add", 1)])
def test_the_states_have_a_gradient_once_the_zeros_have_moved(conditioning, silent):
    head = denoiser(conditioning)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    felt = []
    for step in range(silent + 1):
        z_0, t, states = draw(seed=step)
        states.requires_grad_()
        square_error(head(z_0, t, states), torch.randn(z_0.shape)).sum().backward()
        felt.append(bool(states.grad.any()))
        optimizer.step()
        optimizer.zero_grad()
    assert felt == [False] * silent + [True]


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_state_i_is_of_place_i(conditioning):
    head = awake(denoiser(conditioning))
    z_t, t, states = draw()
    before = head(z_t, t, states)
    other = states.clone()
    other[:, 1 * W + 2] += torch.randn(D)
    moved = (head(z_t, t, other) - before).abs().sum(1)[0]
    assert moved.argmax() == 1 * W + 2


def test_places_are_rows_and_columns():
    places = _places(H, W, 8, torch.device("cpu")).unflatten(0, (H, W))
    assert torch.equal(places[0, :, :4], places[1, :, :4])
    assert torch.equal(places[:, 0, 4:], places[:, 2, 4:])
    assert len(places.flatten(0, 1).unique(dim=0)) == H * W


def test_a_denoiser_learns_to_use_the_states_and_suffers_from_those_of_another_image():
    """The states hold the target; blind, no predictor does better than mean abar, 0.496."""
    torch.manual_seed(0)
    z_0 = torch.randn(16, C, H, W)
    states = torch.cat([z_0.flatten(2).mT, torch.zeros(16, H * W, D - C)], -1)
    head = Denoiser(DenoiserConfig(depth=2, width=64, heads=2), D, C)
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)

    def loss(told: Tensor, draws: int = 4) -> Tensor:
        tiled, eps = z_0.repeat(draws, 1, 1, 1), torch.randn(16 * draws, C, H, W)
        t = torch.randint(1000, (16 * draws,))
        return square_error(head(add_noise(tiled, eps, t, 1000), t, told.repeat(draws, 1, 1)), eps).mean()

    for _ in range(300):
        optimizer.zero_grad()
        loss(states).backward()
        optimizer.step()
    with torch.no_grad():
        right, wrong = float(loss(states, 32)), float(loss(states.roll(1, 0), 32))
    assert right < 0.25
    assert wrong > 2 * right


@pytest.mark.parametrize("depth", [1, 3])
def test_a_regressor_learns_each_place_from_its_own_state(depth):
    torch.manual_seed(0)
    states = torch.randn(8, H * W, D)
    target = torch.randn(8, C, H, W)
    head = Regressor(depth, D, C)
    grid = (H, W)
    changed = states.clone()
    changed[:, 4] += torch.randn(D)
    places = (head(changed, grid) - head(states, grid)).abs().sum((0, 1)).flatten().nonzero()
    assert places.flatten().tolist() == [4]
    if depth == 1:
        return
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(400):
        optimizer.zero_grad()
        regression(head(states, grid), target, "mse").mean().backward()
        optimizer.step()
    assert regression(head(states, grid), target, "mse").mean() < 0.02


def test_the_default_head_is_the_published_one_in_size():
    """For Qwen2-7B's states (3584) and FLUX's latents in groups of 2 x 2 (64 channels)."""
    with torch.device("meta"):
        head = Denoiser(DenoiserConfig(), 3584, 64)
    assert sum(p.numel() for p in head.parameters()) == 63_884_352
    assert sum(p.numel() for p in head.blocks[0].parameters()) == 18_889_728


def test_the_additive_head_norms_the_states_with_weights_of_its_own():
    head = denoiser("add")
    assert head.norm_states.weight.tolist() == [1.0] * D
    assert not head.norm_states.bias.any()
    assert denoiser("adaln_zero").norm_states.weight is None


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_a_new_head_begins_as_the_released_one(conditioning):
    torch.manual_seed(0)
    head = Denoiser(DenoiserConfig(conditioning=conditioning, depth=1, width=256, heads=2), 512, 64)
    weights = {name: p for name, p in head.named_parameters() if p.ndim == 2}
    for name, weight in weights.items():
        fan = 2 / (weight.shape[0] + weight.shape[1])
        if name.endswith("modulation.weight") or name == "out.weight":
            std = 0.0
        elif name.startswith(("states.", "time.")):
            std = 0.02
        else:
            std = fan**0.5  # xavier
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.03), name
    assert not any(p.any() for name, p in head.named_parameters() if name.endswith("bias"))
