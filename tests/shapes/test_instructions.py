"""Instructions are read as they were written, and what has no exact answer is said to have none."""

import random

import pytest
from PIL import Image

from tests.shapes.worlds import worlds
from wemmu.shapes.edits import EDITS, random_edit, random_two_image_edit
from wemmu.shapes.instructions import target_of
from wemmu.shapes.language import caption
from wemmu.shapes.render import render
from wemmu.shapes.scene import Object, Scene, random_scene
from wemmu.shapes.verdict import verdict

CIRCLE, SQUARE = Object(0, "circle", "red", "large"), Object(3, "square", "blue", "small")
SCENE = Scene("white", (CIRCLE, SQUARE))


@worlds
def test_an_instruction_is_read_back_as_the_target_of_its_edit(rng: random.Random):
    for edit in (*(random_edit(rng, kind=kind) for kind in EDITS), random_two_image_edit(rng)):
        assert target_of(edit.instruction, edit.sources) == edit.target, edit.instruction


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [
        ("make the circle happy", "is not an edit"),
        ("remove the cross", "means no object"),
        ("move the circle to the bottom right", "the bottom right of the image is not free"),
        ("add a large red cross at the top left", "the top left of the image is not free"),
    ],
)
def test_an_instruction_without_an_exact_target_is_refused_with_the_reason(instruction: str, reason: str):
    with pytest.raises(ValueError, match=reason):
        target_of(instruction, [SCENE])


def test_a_name_that_fits_two_objects_is_refused():
    twins = Scene("white", (CIRCLE, Object(1, "circle", "blue", "large")))
    with pytest.raises(ValueError, match="means 2 objects"):
        target_of("remove the circle", [twins])
    assert target_of("remove the red circle", [twins]).objects == twins.objects[1:]


@worlds
def test_the_render_of_the_target_is_right_and_another_scene_is_wrong(rng: random.Random):
    scene, other = random_scene(rng), random_scene(rng)
    text = caption(scene, rng, "placed")
    assert verdict(render(scene, 64), text, []).right
    edit = random_edit(rng)
    first = render(edit.sources[0], 64)
    assert verdict(render(edit.target, 64), edit.instruction, [first]).right
    assert verdict(first, edit.instruction, [first]).right is False
    if other != scene:
        judged = verdict(render(other, 64), "", [render(scene, 64)])
        assert judged.right is False
        assert judged.words.startswith("shows a ")


def test_a_request_without_an_exact_answer_is_not_scored():
    drawn, noise = render(SCENE, 64), Image.effect_noise((64, 64), 90)
    for text, inputs in (("a dog on a beach", []), ("", []), ("make the circle happy", [drawn]), ("", [noise])):
        judged = verdict(drawn, text, inputs)
        assert judged.right is None
        assert "Not scored" in judged.words
    assert verdict(noise, "a red circle", []).words == "shows no scene of the shapes world"
