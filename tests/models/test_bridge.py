"""Query designs, VAE branch and position MLP: from a prefix to a condition."""

import pytest
import torch

from tests.models.world import make_batch, make_model
from wemmu.config.schema import Backbones
from wemmu.config.task import Task
from wemmu.noise import Noise
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.recipes.wemmu.position_mlp import PositionMLP, center_crop
from wemmu.recipes.wemmu.queries import LearnableFixedQueries, NoisyQueries
from wemmu.types import Batch, Condition

DESIGNS = ("noisy", "learnable_fixed", "learnable_dynamic")


def condition(model: WeMMU, batch: Batch, step: int = 0) -> Condition:
    size = tuple(batch.target.shape[-2:])
    return model.condition(batch.prompts, batch.images, size, Noise(0, step, batch.sample_ids))


@pytest.fixture(scope="module", params=[(d, v) for d in DESIGNS for v in (True, False)], ids=str)
def variant(request: pytest.FixtureRequest, backbones: Backbones) -> tuple[str, WeMMU]:
    """Every query design with and without the VAE branch."""
    design, vae_branch = request.param
    return design, make_model(backbones, design, vae_branch)


@torch.no_grad()
@pytest.mark.parametrize(("size", "grid"), [((32, 32), (2, 2)), ((48, 32), (3, 2)), ((16, 80), (1, 5))], ids=str)
@pytest.mark.parametrize("task", [Task.T2I, Task.MULTI_EDIT])
def test_there_is_one_state_of_the_dits_width_for_each_query(variant, encoder: PromptEncoder, task, size, grid):
    design, model = variant
    states = condition(model, make_batch(encoder, [0, 1], task, size)).states
    queries = 9 if design == "learnable_fixed" else grid[0] * grid[1]
    assert states.shape == (2, queries, model.dit.config.caption_channels)
    assert states.isfinite().all()


@torch.no_grad()
def test_permuting_the_batch_permutes_the_conditions(variant, encoder: PromptEncoder):
    _, model = variant
    straight = condition(model, make_batch(encoder, [0, 1, 2])).states
    permuted = condition(model, make_batch(encoder, [2, 0, 1])).states
    torch.testing.assert_close(permuted, straight[[2, 0, 1]], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_input_latents_matter_exactly_where_the_vae_branch_is_on(variant, encoder: PromptEncoder):
    _, model = variant
    batch = make_batch(encoder, [0, 1])
    prefix = model.vlm.prefix(batch.prompts, batch.images)
    latents = torch.randn(2, 1, model.vae.latent_channels, 2, 2, generator=torch.Generator().manual_seed(0))
    noise = Noise(0, 0, batch.sample_ids)
    given, other = (model.bridge(prefix, x, (2, 2), noise).states for x in (latents, -latents))
    if model.bridge.vae_branch is None:
        assert torch.equal(given, other)
    else:
        assert ((given - other).abs().amax((1, 2)) > 1e-4).all()


@torch.no_grad()
def test_the_vae_branch_is_given_the_latents_of_the_input_images(model: WeMMU, encoder: PromptEncoder):
    images = make_batch(encoder, [0, 1], Task.MULTI_EDIT, (48, 32)).images
    latents = model.input_latents(images)
    for b in range(2):
        for n in range(2):
            alone = model.vae.encode(images[b, n][None])[0]
            torch.testing.assert_close(latents[b, n], alone, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_vae_tokens_stand_in_row_major_order_image_after_image(model: WeMMU):
    b, n, h, w = 1, 2, 2, 3
    latents = torch.randn(b, n, model.vae.latent_channels, h, w)
    tokens = model.bridge.vae_branch(latents)
    for image, row, column in [(0, 0, 1), (0, 1, 0), (1, 1, 2)]:
        expected = model.bridge.vae_branch.linear(latents[0, image, :, row, column])
        torch.testing.assert_close(tokens[0, image * h * w + row * w + column], expected)


def test_noisy_queries_have_no_parameters():
    assert [*NoisyQueries(8, 1.0).parameters()] == []


@pytest.mark.parametrize("other", [(1, 0, 7), (0, 1, 7), (0, 0, 8)], ids=["seed", "step", "sample"])
def test_noisy_queries_change_with_seed_step_and_sample(other: tuple[int, int, int]):
    def drawn(seed: int, step: int, sample: int) -> torch.Tensor:
        return NoisyQueries(8, 1.0)(2, 3, Noise(seed, step, torch.tensor([sample])))

    assert torch.equal(drawn(0, 0, 7), drawn(0, 0, 7))
    assert (drawn(0, 0, 7) != drawn(*other)).all()


# Odd and small shapes too: a generator keeps half a pair of normal draws for later.
@pytest.mark.parametrize("shape", [(), (3,), (2, 8)])
def test_noise_of_a_sample_does_not_depend_on_its_batch(shape: tuple[int, ...]):
    together = Noise(0, 5, torch.tensor([4, 9, 2])).normal("queries", shape)
    for i, sample in enumerate([4, 9, 2]):
        assert torch.equal(together[i], Noise(0, 5, torch.tensor([sample])).normal("queries", shape)[0])


def test_noise_for_different_purposes_is_independent():
    noise = Noise(0, 0, torch.arange(500))
    a, b = noise.normal("queries", (20,)), noise.normal("eps", (20,))
    assert abs(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]) < 0.03


def test_noisy_queries_are_standard_normal_times_std():
    drawn = NoisyQueries(64, 2.0)(4, 4, Noise(0, 0, torch.arange(50)))
    assert abs(float(drawn.mean())) < 0.03
    assert abs(float(drawn.std()) - 2) < 0.03


def test_learnable_queries_do_not_depend_on_noise(variant, encoder: PromptEncoder):
    design, model = variant
    a, b = (model.bridge.queries(2, 2, Noise(s, s, torch.arange(3))) for s in range(2))
    assert torch.equal(a, b) == (design != "noisy")


@pytest.mark.parametrize("large", range(1, 9))
def test_smaller_grids_share_the_rows_and_columns_of_larger_ones(large: int):
    table = torch.arange(64.0).reshape(8, 8, 1)
    outer = set(center_crop(table, large, 8).flatten().tolist())
    for small in range(1, large + 1):
        inner = center_crop(table, small, 8)
        assert inner.shape == (small, 8, 1)
        assert set(inner.flatten().tolist()) <= outer
    assert torch.equal(center_crop(table, 4, 4)[1:3, 1:3], center_crop(table, 2, 2)), "the centre itself is shared"
    assert torch.equal(center_crop(table.transpose(0, 1), 3, large), center_crop(table, large, 3).transpose(0, 1))


@pytest.mark.parametrize("grid", [(9, 2), (2, 9)], ids=str)
def test_a_grid_larger_than_the_table_is_refused(grid: tuple[int, int]):
    with pytest.raises(ValueError, match=r"bridge\.position_table = 8"):
        center_crop(torch.zeros(8, 8, 1), *grid)


def test_fixed_queries_need_a_square_number():
    with pytest.raises(ValueError, match="square"):
        LearnableFixedQueries(8, 10, 1.0)


@torch.no_grad()
def test_the_position_mlp_is_the_gated_mlp_of_state_plus_position():
    mlp = PositionMLP(4, 6, side=5, std=1.0)
    states = torch.randn(2, 3, 4)
    x = states[1, 2] + mlp.table[2, 3]  # row 0 and column 2 of a 1 x 3 grid in a table of 5
    gate, up = mlp.gate.weight @ x, mlp.up.weight @ x
    expected = mlp.down.weight @ (gate * torch.sigmoid(gate) * up)
    torch.testing.assert_close(mlp(states, 1, 3)[1, 2], expected)


def test_the_pathway_starts_as_a_copy_that_is_not_shared_with_the_vlm(model: WeMMU):
    own, copied = model.vlm.language_model.layers.state_dict(), model.bridge.pathway.layers.state_dict()
    assert own.keys() == copied.keys()
    assert all(torch.equal(own[name], copied[name]) for name in own)
    assert {t.data_ptr() for t in own.values()}.isdisjoint(t.data_ptr() for t in copied.values())


def test_a_bridge_is_initialised_by_its_seed_alone(backbones: Backbones):
    torch.manual_seed(5)
    first = make_model(backbones).bridge
    torch.manual_seed(6)
    second = make_model(backbones).bridge
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
