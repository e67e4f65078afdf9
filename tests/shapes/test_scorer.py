"""The scorer is exact where an image is one, and says nothing where it is none."""

import io
import random
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from wemmu.shapes.edits import Edit, random_edit
from wemmu.shapes.language import full_caption
from wemmu.shapes.render import render
from wemmu.shapes.scene import BACKGROUNDS, COLORS, SHAPES, Object, Scene, random_scene
from wemmu.shapes.scene import SIZES as OBJECT_SIZES
from wemmu.shapes.scorer import MAX_RMSE, caption_satisfied, read, same_scene, score_edit

SIZES = [32, 64, 96, (64, 96)]
VAE = Path(__file__).parents[2] / "assets" / "shapes" / "sana" / "vae"
Damage = Callable[[Image.Image], Image.Image]


def scenes(number: int, seed: int = 0) -> list[Scene]:
    rng = random.Random(seed)
    return [random_scene(rng, rng.choice(("train", "test", "composition"))) for _ in range(number)]


def clean(image: Image.Image) -> Image.Image:
    return image


def blurred(image: Image.Image) -> Image.Image:
    """By two pixels, or one at 32 px. Somewhat more, and a small square cannot be told from a small circle."""
    return image.filter(ImageFilter.GaussianBlur(min(2.0, min(image.size) / 32)))


def noisy(image: Image.Image) -> Image.Image:
    pixels = np.asarray(image, dtype=np.float32)
    grain = np.random.default_rng(0).normal(0, 0.1 * 255, pixels.shape)
    return Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))


def compressed(image: Image.Image) -> Image.Image:
    """JPEG at 90; below about 80 its coarse chroma makes circles of small squares on gray."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return Image.open(buffer)


def accuracy(pairs: list[tuple[Image.Image, Scene]]) -> float:
    return sum(same_scene(image, scene) for image, scene in pairs) / len(pairs)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("damage", [clean, blurred, noisy, compressed])
def test_renders_are_read_right(damage: Damage, size: int | tuple[int, int]):
    assert accuracy([(damage(render(scene, size)), scene) for scene in scenes(60)]) == 1.0


@pytest.mark.parametrize("size", [32, 64])
def test_every_object_is_told_from_every_other(size: int):
    """All shapes, colours and sizes on all backgrounds, alone in a cell, each its own."""
    for background in BACKGROUNDS:
        for i, color in enumerate(COLORS):
            for k, shape in enumerate(SHAPES):
                for object_size in OBJECT_SIZES:
                    scene = Scene(background, (Object((i + k) % 4, shape, color, object_size),))
                    assert same_scene(render(scene, size), scene), scene


@pytest.mark.parametrize("size", SIZES)
def test_what_is_no_scene_is_not_read(size: int | tuple[int, int]):
    height, width = (size, size) if isinstance(size, int) else size
    rng = np.random.default_rng(0)
    pixels = [rng.uniform(0, 255, (height, width, 3)) for _ in range(20)]
    pixels += [rng.normal(128, 60, (height, width, 3)).clip(0, 255) for _ in range(20)]
    # One colour that is no background's; and a square that stands between two cells.
    pixels += [np.broadcast_to(np.array([0, 255, 0]), (height, width, 3))]
    square = np.asarray(render(Scene("white", (Object(0, "square", "red", "large"),)), size))
    pixels += [np.roll(square, width // 4, axis=1)]
    for image in pixels:
        assert read(Image.fromarray(image.astype(np.uint8))).scene is None


def test_error_leaves_a_margin_on_both_sides():
    """What MAX_RMSE is set between: the worst of damaged renders, and noise."""
    assert max(read(compressed(render(scene, 64))).rmse for scene in scenes(60)) < 0.5 * MAX_RMSE
    assert max(read(blurred(render(scene, 64))).rmse for scene in scenes(60)) < 0.95 * MAX_RMSE
    rng = np.random.default_rng(0)
    noise = (rng.normal(128, 40, (64, 64, 3)).clip(0, 255).astype(np.uint8) for _ in range(10))
    assert min(read(Image.fromarray(pixels)).rmse for pixels in noise) > 1.05 * MAX_RMSE


def test_captions_are_scored_by_what_the_image_shows():
    for scene, other in pairwise(scenes(40)):
        image = render(scene, 64)
        assert caption_satisfied(image, full_caption(scene))
        assert caption_satisfied(image, full_caption(other)) == (scene == other)


def recolor() -> Edit:
    """The red circle of two objects turns blue."""
    circle, square = Object(0, "circle", "red", "large"), Object(3, "square", "green", "small")
    source, target = Scene("white", (circle, square)), Scene("white", (Object(0, "circle", "blue", "large"), square))
    return Edit("recolor", (source,), "make the circle blue", target)


def test_edit_carried_out():
    edit = recolor()
    score = score_edit(render(edit.target, 64), edit)
    assert (score.correct, score.followed, score.preserved, score.copied) == (True, True, True, False)


def test_edit_ignored():
    edit = recolor()
    score = score_edit(render(edit.sources[0], 64), edit)
    assert (score.correct, score.followed, score.preserved, score.copied) == (False, False, True, True)


@pytest.mark.parametrize(
    "image",
    [
        Scene("black", recolor().target.objects),
        Scene("white", recolor().target.objects[:1]),
        Scene("white", (*recolor().target.objects, Object(1, "cross", "cyan", "small"))),
    ],
    ids=["other background", "lost an object", "one object more"],
)
def test_edit_followed_at_the_expense_of_the_rest(image: Scene):
    score = score_edit(render(image, 64), recolor())
    assert (score.correct, score.followed, score.preserved, score.copied) == (False, True, False, False)


def test_wrong_edit_of_the_right_object():
    square = recolor().sources[0].objects[1]
    score = score_edit(render(Scene("white", (Object(0, "circle", "yellow", "large"), square)), 64), recolor())
    assert (score.correct, score.followed, score.preserved, score.copied) == (False, False, True, False)


def test_unreadable_image_is_no_edit():
    score = score_edit(noisy(Image.effect_noise((64, 64), 90).convert("RGB")), recolor())
    assert (score.correct, score.followed, score.preserved, score.copied) == (False, False, False, False)


def test_every_edit_is_scored_right():
    rng = random.Random(0)
    for _ in range(60):
        edit = random_edit(rng)
        assert score_edit(blurred(render(edit.target, 64)), edit).correct
        assert score_edit(blurred(render(edit.sources[0], 64)), edit).copied


@pytest.mark.skipif(not VAE.is_dir(), reason="the autoencoder of the miniature is not in assets/shapes")
@torch.no_grad()
def test_decoded_renders_are_read_right():
    """The autoencoder's own loss costs almost no score, so what a model misses is the model's."""
    from diffusers import AutoencoderDC

    from wemmu.pixels import to_images, to_pixels

    vae = AutoencoderDC.from_pretrained(VAE).eval()
    chosen = scenes(150, seed=1)
    decoded = vae.decode(vae.encode(to_pixels([render(scene, 64) for scene in chosen])).latent).sample
    assert accuracy(list(zip(to_images(decoded), chosen, strict=True))) >= 0.97
