"""What the head must reconstruct: every target on the grid of the tokens, and its place in the image kept."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderDC, AutoencoderKL
from pydantic import ValidationError

from tests.backbones.test_autoencoder_kl import FLUX, LEVELS
from tests.backbones.test_encoders import make_folder
from tests.models.world import make_ross, random_images
from wemmu.backbones.vae import FrozenVAE
from wemmu.config.schema import Backbones
from wemmu.objectives.reconstruction import regression
from wemmu.recipes.ross.config import Denoiser, Features, Latents, LatentToPixel, Pixels, Ross
from wemmu.recipes.ross.heads import make_head
from wemmu.recipes.ross.targets import FeatureTarget, LatentTarget, LatentToPixelTarget, PixelTarget, on_grid
from wemmu.recipes.staged import startable

IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]
# Of a VLM with tokens of 28 px; an autoencoder of 8 px in groups of 2 has cells of 16 px.
TOKEN, GRID = 28, (3, 4)


@pytest.fixture(scope="module")
def flux() -> FrozenVAE:
    torch.manual_seed(0)
    return FrozenVAE(AutoencoderKL(**LEVELS, **FLUX))


@pytest.fixture(scope="module")
def trained() -> FrozenVAE:
    """The shipped one of 16 px: random weights do not keep what stands where."""
    return FrozenVAE(AutoencoderDC.from_pretrained(Path(__file__).parents[2] / "assets/shapes/sana/vae"))


def patch_changed(images: torch.Tensor, row: int, column: int) -> torch.Tensor:
    """The same images, but for the patch of one token."""
    changed = images.clone()
    patch = ..., slice(row * TOKEN, (row + 1) * TOKEN), slice(column * TOKEN, (column + 1) * TOKEN)
    changed[patch] = 255 - changed[patch]
    return changed


@pytest.mark.parametrize("kind", ["pixels", "latents", "latent2pixel"])
@pytest.mark.parametrize("place", [(0, 0), (1, 2), (2, 3)])
def test_a_bright_patch_is_brightest_at_its_token(trained: FrozenVAE, kind: str, place: tuple[int, int]):
    target = {
        "pixels": PixelTarget(Pixels(), TOKEN),
        "latents": LatentTarget(Latents(group=2), trained),
        "latent2pixel": LatentToPixelTarget(LatentToPixel(group=2), trained),
    }[kind]
    dark = random_images(1, 1, 3, GRID[0] * TOKEN, GRID[1] * TOKEN) // 8
    found, dark = target.encode(patch_changed(dark, *place), GRID), target.encode(dark, GRID)
    assert tuple(found.shape[-2:]) == GRID
    if kind != "latent2pixel":
        assert found.shape[1] == target.channels
    difference = (found - dark).abs().sum(1).flatten()
    assert difference.argmax() == place[0] * GRID[1] + place[1]
    if kind == "pixels":
        assert difference.count_nonzero() == 1


def test_a_group_of_latents_is_the_released_codes(flux: FrozenVAE):
    """Channel c * 4 + dy * 2 + dx of a cell is channel c of the latent at (2 row + dy, 2 column + dx); 16 px a cell."""
    target, images = LatentTarget(Latents(group=2), flux), random_images(0, 2, 3, 48, 64)
    z, single = target.encode(images, GRID), flux.encode(images)
    assert z.shape == (2, 64, *GRID)
    for c, dy, dx in ((0, 0, 0), (3, 0, 1), (7, 1, 0), (15, 1, 1)):
        assert torch.equal(z[:, c * 4 + dy * 2 + dx], single[:, c, dy::2, dx::2])
    assert torch.equal(F.pixel_shuffle(z, 2), single)
    torch.testing.assert_close(target.image(z, images), flux.decode(single))


@pytest.mark.parametrize(("side", "cells"), [(336, 24), (384, 27)])
def test_published_sizes_give_the_released_shapes(flux: FrozenVAE, side: int, cells: int):
    """Encoders of 14 px: 24 x 24 cells from 384 px, 27 x 27 from 432 px."""
    seen = []
    handle = flux.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[-1]))
    z = LatentTarget(Latents(group=2), flux).encode(random_images(0, 1, 3, side, side), (cells, cells))
    handle.remove()
    assert z.shape == (1, 64, cells, cells)
    assert seen == [16 * cells]


def test_pixels_normalised_by_patch_have_no_brightness_and_get_it_back_from_the_image():
    images = random_images(0, 2, 3, 3 * TOKEN, 4 * TOKEN)
    target, plain = PixelTarget(Pixels(norm="patch"), TOKEN), PixelTarget(Pixels(), TOKEN)
    z = target.encode(images, GRID)
    assert z.mean(1).abs().max() < 1e-5
    assert torch.allclose(z.std(1), torch.ones(2, *GRID), atol=1e-4)
    darker = PixelTarget(Pixels(norm="patch"), TOKEN).encode(images // 2, GRID)
    assert (darker - z).abs().mean() < 0.01
    assert (plain.encode(images // 2, GRID) - plain.encode(images, GRID)).abs().mean() > 0.1
    assert torch.allclose(target.image(z, images), images / 127.5 - 1, atol=1e-5)
    # A patch of one colour has no structure, and no infinite one.
    assert target.encode(torch.full_like(images, 200), GRID).abs().max() < 1e-3


def test_latent2pixel_compares_pixels_and_has_a_gradient_through_the_frozen_decoder(trained: FrozenVAE):
    target, images = LatentToPixelTarget(LatentToPixel(), trained), random_images(0, 2, 3, 64, 64)
    grid = (4, 4)
    wanted = target.encode(images, grid)
    assert torch.equal(F.pixel_shuffle(wanted, trained.latent_px), images / 127.5 - 1)
    latents = LatentTarget(Latents(), trained).encode(images, grid).requires_grad_()
    loss = regression(target.decoded(latents), wanted, "mse")
    theirs = (trained.decode(latents.detach()) - (images / 127.5 - 1)).square().flatten(1).mean(1)
    torch.testing.assert_close(loss, theirs)
    loss.sum().backward()
    assert latents.grad.any()
    assert not any(p.requires_grad or p.grad is not None for p in trained.parameters())
    # A step against the gradient makes the pixels more like the image.
    better = latents.detach() - 0.01 * latents.grad / latents.grad.norm() * latents.norm()
    assert (regression(target.decoded(better), wanted, "mse") < loss).all()


def test_another_grid_is_resampled_and_a_place_stays_its_share_of_the_image():
    for h, w, grid in ((24, 24, (12, 12)), (16, 16, (12, 8)), (6, 6, (9, 12))):
        for row, column in ((0, 0), (1, 3), (h - 1, w - 1)):
            features = torch.zeros(1, 2, h, w)
            features[..., row, column] = 1
            found = on_grid(features, grid)[0, 0]
            assert tuple(found.shape) == grid
            peak = divmod(int(found.argmax()), grid[1])
            # The middle of the cell in the image, and that of the strongest one: less than a cell apart.
            for at, place, cells, there in zip(peak, (row, column), (h, w), grid, strict=True):
                assert abs(at + 0.5 - (place + 0.5) / cells * there) < 0.8
    same = torch.randn(1, 2, 3, 4)
    assert on_grid(same, (3, 4)) is same
    assert torch.allclose(on_grid(torch.ones(1, 1, 5, 7), (3, 9)), torch.ones(1, 1, 3, 9))


@pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
def test_features_are_the_encoders_over_the_whole_image_on_the_grid_of_the_tokens(tmp_path, backbones, kind: str):
    folder = make_folder(kind, tmp_path / kind)
    ross = make_ross(backbones, target={"kind": "features", "encoder": str(folder)}, head={"kind": "linear"})
    images = random_images(0, 1, 3, 64, 96)
    z = ross.target(images)
    assert z.shape == (1, ross.teacher.model.config.hidden_size, 4, 6)
    assert z.mean(1).abs().max() < 1e-4
    assert torch.allclose(z.std(1, correction=0), torch.ones(1, 4, 6), atol=1e-2)
    # Where nothing is to be resized or resampled, they are the encoder's own but for the crop.
    square = random_images(1, 1, 3, 32, 32)
    raw = FeatureTarget(Features(encoder=folder, norm="none"), ross.teacher).encode(square, (4, 4))
    pixels = (square / 255 - IMAGENET_MEAN) / IMAGENET_STD
    theirs = ross.teacher.adapter.patches(ross.teacher.model, pixels)
    torch.testing.assert_close(raw.flatten(2).transpose(1, 2), theirs, atol=1e-4, rtol=1e-4)
    # Nothing is cropped: the border, which the published preprocessing of DINOv2 cuts off, counts.
    changed = images.clone()
    changed[..., -3:] = 255 - changed[..., -3:]
    moved = (ross.target(changed) - z).abs().sum(1)[0]
    assert moved.sum(0).argmax() == 5
    # The teacher learns nothing and stays as it is evaluated.
    ross.ready_to_train(("projector", "llm", "head"), checkpointing=False)
    assert not ross.teacher.model.training
    assert not any(p.requires_grad for p in ross.teacher.parameters())
    assert not any("teacher" in name for name in startable(ross))
    assert ross.targets.image(z, images).shape == (1, 3, 64, 96)


HEADS = {
    "linear": {"kind": "linear"},
    "mlp": {"kind": "mlp", "depth": 3},
    "transformer": {"kind": "transformer", "depth": 2, "width": 16, "heads": 2},
}


@pytest.mark.parametrize(("config", "sees_others"), [*((HEADS[k], k == "transformer") for k in HEADS)], ids=HEADS)
def test_a_regression_head_predicts_a_token_and_only_a_transformer_sees_its_neighbours(config: dict, sees_others: bool):
    torch.manual_seed(0)
    head, states = make_head(Ross(head=config).head, 12, 5), torch.randn(2, 6, 12)
    predicted = head(states, (2, 3))
    assert predicted.shape == (2, 5, 2, 3)
    changed = states.clone()
    changed[:, 4] += torch.randn(12)
    moved = (head(changed, (2, 3)) - predicted).abs().sum((0, 1)).flatten() > 1e-6
    assert moved[4]
    assert moved.all() == sees_others
    assert moved.sum() == (6 if sees_others else 1)


def test_a_transformer_tells_places_apart_that_have_one_state():
    torch.manual_seed(0)
    head = make_head(Ross(head=HEADS["transformer"]).head, 12, 5)
    predicted = head(torch.randn(1, 1, 12).expand(1, 6, 12), (2, 3))
    assert len(predicted.flatten(2)[0].T.unique(dim=0)) == 6


def test_configs_of_earlier_versions_mean_what_they_meant():
    assert Ross() == Ross.model_validate({"target": "latents", "head": {"kind": "denoiser"}})
    old = Ross.model_validate({"target": "pixels", "head": {"kind": "regressor", "depth": 3, "metric": "cosine"}})
    assert old.target == Pixels()
    assert old.head.model_dump() == {"kind": "mlp", "depth": 3, "metric": "cosine"}
    assert Ross.model_validate(old.model_dump()) == old


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"target": "words"}, "'latents', 'pixels', 'features', 'latent2pixel'"),
        ({"target": {"kind": "pixels", "group": 2}}, "target.pixels.group"),
        ({"target": {"kind": "features"}}, "target.features.encoder"),
        ({"head": {"kind": "linear", "depth": 2}}, "head.linear.depth"),
        ({"head": {"kind": "conv"}}, "'denoiser', 'linear', 'mlp', 'transformer'"),
        ({"head": {"kind": "denoiser", "width": 30, "heads": 4}}, "must be a multiple of 4 and of its 4 heads"),
        ({"target": "latent2pixel"}, "valid heads with it: linear, mlp, transformer"),
        ({"target": "latent2pixel", "head": {"kind": "mlp", "metric": "cosine"}}, "valid with it: mse, smooth_l1"),
    ],
)
def test_a_wrong_target_or_head_is_refused_with_the_valid_ones(recipe: dict, said: str):
    with pytest.raises(ValidationError) as error:
        Ross.model_validate(recipe)
    assert said in str(error.value)


def test_a_denoiser_denoises_every_target_but_latent2pixel(backbones: Backbones):
    for target in ("latents", "pixels", {"kind": "pixels", "norm": "patch"}, {"kind": "latents", "group": 2}):
        ross = make_ross(backbones, target=target, head={"kind": "denoiser", "depth": 1, "width": 16, "heads": 2})
        z = ross.target(random_images(0, 1, 3, 32, 32))
        assert z.shape == (1, ross.head.out.out_features, 2, 2)
        assert isinstance(ross.config.head, Denoiser)
