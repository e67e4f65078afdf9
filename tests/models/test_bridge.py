"""Query designs, VAE branch and position MLP: from a prefix to a condition."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.models.world import make_batch, make_model
from wemmu.config.schema import Backbones
from wemmu.config.task import Task
from wemmu.noise import Noise
from wemmu.prompts import PromptEncoder
from wemmu.recipes.wemmu.config import Bridge as BridgeConfig
from wemmu.recipes.wemmu.config import States
from wemmu.recipes.wemmu.model import WeMMU
from wemmu.recipes.wemmu.pathway import Pathway
from wemmu.recipes.wemmu.position_mlp import PositionMLP, center_crop, span
from wemmu.recipes.wemmu.queries import LearnableFixedQueries, NoisyQueries, sincos
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


# Odd and small shapes too: a generator keeps half a pair of normal draws for later.
@pytest.mark.parametrize("shape", [(), (3,), (2, 8)])
def test_noise_of_a_sample_does_not_depend_on_its_batch(shape: tuple[int, ...]):
    together = Noise(0, 5, torch.tensor([4, 9, 2])).normal("queries", shape)
    for i, sample in enumerate([4, 9, 2]):
        assert torch.equal(together[i], Noise(0, 5, torch.tensor([sample])).normal("queries", shape)[0])


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
    mlp = PositionMLP(BridgeConfig(position_table=5), 4, 6)
    states = torch.randn(2, 3, 4)
    x = states[1, 2] + mlp.table[2, 3]  # row 0 and column 2 of a 1 x 3 grid in a table of 5
    gate, up = mlp.gate.weight @ x, mlp.up.weight @ x
    expected = mlp.down.weight @ (gate * torch.sigmoid(gate) * up)
    torch.testing.assert_close(mlp(states[:, :, None], 1, 3)[1, 2], expected)


@torch.no_grad()
@pytest.mark.parametrize("normalise", [False, True])
def test_states_of_several_layers_are_stacked_or_routed_by_the_last_one(normalise: bool):
    states = torch.randn(2, 3, 2, 4)
    first, last = (F.normalize(states, dim=-1) * 2 if normalise else states)[1, 2]  # a root mean square of 1

    def condition(combine: str, x: Callable[[PositionMLP], Tensor]) -> tuple[Tensor, Tensor]:
        several = States(layers=2, combine=combine, normalise=normalise)
        mlp = PositionMLP(BridgeConfig(position_table=5, states=several), 4, 6)
        return mlp(states, 1, 3)[1, 2], mlp.down(F.silu(mlp.gate(x(mlp))) * mlp.up(x(mlp)))

    def routed(mlp: PositionMLP) -> Tensor:
        w = (mlp.router.weight @ last + mlp.router.bias).softmax(0)
        return w[0] * first + w[1] * last + mlp.table[2, 3]

    torch.testing.assert_close(*condition("stack", lambda mlp: torch.cat([first, last + mlp.table[2, 3]])))
    torch.testing.assert_close(*condition("route", routed))


@torch.no_grad()
def test_states_come_from_evenly_spaced_layers_the_last_among_them(model: WeMMU, encoder: PromptEncoder):
    batch, language = make_batch(encoder, [0, 1]), model.vlm.language_model
    prefix = model.vlm.prefix(batch.prompts, batch.images)
    tokens, positions = torch.randn(2, 4, language.config.hidden_size), torch.arange(4).expand(3, 2, 4)
    one, several = Pathway(language), Pathway(language, 2)
    depth = len(several.layers)
    found = several(tokens, positions, prefix)
    assert torch.equal(found[:, :, -1], one(tokens, positions, prefix)[:, :, 0])
    del several.layers[depth // 2 :]
    half = replace(prefix, keys=prefix.keys[: depth // 2], values=prefix.values[: depth // 2])
    assert torch.equal(found[:, :, 0], several(tokens, positions, half)[:, :, 0])
    with pytest.raises(ValueError, match=f"states.layers = {depth + 1}, but the VLM has {depth}"):
        Pathway(language, depth + 1)


def test_the_span_of_a_small_grid_reaches_over_the_whole_table():
    table = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), dim=-1)
    assert span(table, 2, 4)[:, :, 0].tolist() == [[2] * 4, [6] * 4]
    assert span(table, 2, 4)[:, :, 1].tolist() == [[1, 3, 5, 7]] * 2
    assert torch.equal(span(table, 8, 8), table)


@torch.no_grad()
def test_sincos_tells_every_cell_from_every_other():
    code = sincos(37, 40, 64)
    distances = torch.cdist(code, code).fill_diagonal_(9.0)
    assert float(distances.min()) > 0.5
    drawn = NoisyQueries(64, 1.0)(3, 3, Noise(0, 0, torch.arange(2000))) + sincos(3, 3, 64)
    torch.testing.assert_close(drawn.mean(0), sincos(3, 3, 64), atol=0.1, rtol=0)


def test_a_bridge_is_initialised_by_its_seed_alone(backbones: Backbones):
    torch.manual_seed(5)
    first = make_model(backbones).bridge
    torch.manual_seed(6)
    second = make_model(backbones).bridge
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
