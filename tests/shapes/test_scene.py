"""Scenes, and the splits that keep training and test apart."""

import random

import pytest

from tests.shapes.worlds import worlds
from wemmu.shapes.scene import (
    BACKGROUNDS,
    CELLS,
    COLORS,
    HELD_OUT,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    random_scene,
)

SPLITS = ("train", "test", "composition")


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("objects", [None, 1, 2, 3])
def test_drawn_scenes_belong_to_the_split_that_was_asked_for(split: str, objects: int | None):
    rng = random.Random(0)
    for _ in range(50):
        scene = random_scene(rng, split, objects)
        assert scene.split == split
        assert len(scene.objects) == objects if objects else 1 <= len(scene.objects) <= MAX_OBJECTS


def test_held_out_pairs_are_only_in_the_composition_split():
    rng = random.Random(1)
    for split in SPLITS:
        for _ in range(300):
            pairs = {(o.color, o.shape) for o in random_scene(rng, split).objects}
            assert bool(pairs & HELD_OUT) == (split == "composition")


@worlds
def test_split_is_a_property_of_the_content(rng: random.Random):
    """However a scene came about: objects in another order, drawn for another purpose, it is the same scene."""
    scene = random_scene(rng, rng.choice(SPLITS))
    again = Scene(scene.background, tuple(rng.sample(scene.objects, len(scene.objects))))
    assert again == scene
    assert again.split == scene.split


def test_a_tenth_of_the_scenes_is_for_the_test():
    """Of all one-object scenes without a held-out pair, all of them."""
    scenes = [
        Scene(background, (Object(cell, shape, color, size),))
        for background in BACKGROUNDS
        for cell in range(len(CELLS))
        for shape in SHAPES
        for color in COLORS
        for size in SIZES
        if (color, shape) not in HELD_OUT
    ]
    share = sum(scene.split == "test" for scene in scenes) / len(scenes)
    assert len(scenes) == 4 * 4 * 22 * 2
    assert 0.07 < share < 0.13


def test_two_objects_in_one_cell_are_refused():
    circle = Object(0, "circle", "red", "large")
    with pytest.raises(ValueError, match="share a cell"):
        Scene("white", (circle, Object(0, "cross", "blue", "small")))


@pytest.mark.parametrize(
    "wrong", [(4, "circle", "red", "large"), (0, "star", "red", "large"), (0, "circle", "teal", "large")]
)
def test_objects_out_of_this_world_are_refused(wrong: tuple[int, str, str, str]):
    with pytest.raises(ValueError, match="valid choices"):
        Object(*wrong)


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="valid choices: train, test, composition"):
        random_scene(random.Random(0), "valid")
