"""Captions say what is true of their scene and of no scene that differs in what they mention."""

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest

from tests.shapes.worlds import worlds
from wemmu.shapes.language import (
    NUMBERS,
    WORDINGS,
    Demand,
    Mention,
    caption,
    full_caption,
    parse_caption,
    question,
    references,
    wordings,
)
from wemmu.shapes.scene import BACKGROUNDS, CELLS, COLORS, SHAPES, SIZES, Object, Scene, random_scene


def neighbours(scene: Scene) -> Iterator[tuple[str, Scene]]:
    """Every scene that differs in one thing, and the name of that thing."""
    for background in set(BACKGROUNDS) - {scene.background}:
        yield "background", replace(scene, background=background)
    for obj in scene.objects:
        others = tuple(o for o in scene.objects if o is not obj)
        values = {"shape": SHAPES, "color": COLORS, "size": SIZES, "cell": scene.free_cells}
        for field, choices in values.items():
            for value in choices:
                if value != getattr(obj, field):
                    yield field, replace(scene, objects=(*others, replace(obj, **{field: value})))
        if others:
            yield "number", replace(scene, objects=others)
    for cell in scene.free_cells:
        yield "number", replace(scene, objects=(*scene.objects, Object(cell, "circle", "red", "large")))


@worlds
def test_caption_is_satisfied_by_its_scene(rng: random.Random):
    scene = random_scene(rng, rng.choice(("train", "test", "composition")))
    assert parse_caption(caption(scene, rng)).satisfied_by(scene)
    assert parse_caption(full_caption(scene)).satisfied_by(scene)


@worlds
def test_a_wording_that_is_asked_for_is_what_comes_out(rng: random.Random):
    scene = random_scene(rng)
    for wording in wordings(scene):
        demand = parse_caption(caption(scene, rng, wording))
        assert demand.satisfied_by(scene)
        assert (demand.relation is not None) == (wording == "related")
        assert all((mention.cell is not None) == (wording == "placed") for mention in demand.mentions)


def test_a_wording_that_a_scene_does_not_allow_is_refused():
    one = Scene("white", (Object(0, "circle", "red", "large"),))
    diagonal = Scene("white", (*one.objects, Object(3, "square", "blue", "small")))
    beside = Scene("white", (*one.objects, Object(1, "square", "blue", "small")))
    assert wordings(beside) == WORDINGS
    for scene in (one, diagonal):
        with pytest.raises(
            ValueError, match="no caption with the wording related fits this scene; valid choices: placed, unplaced"
        ):
            caption(scene, random.Random(0), "related")


@worlds
def test_full_caption_is_satisfied_by_nothing_else(rng: random.Random):
    scene = random_scene(rng)
    demand = parse_caption(full_caption(scene))
    for field, other in neighbours(scene):
        assert not demand.satisfied_by(other), (field, other)


@worlds
def test_caption_is_not_satisfied_by_what_it_mentions_otherwise(rng: random.Random):
    """Colour, shape, number and, where it is said, background always count."""
    scene = random_scene(rng)
    demand = parse_caption(caption(scene, rng))
    always = {"shape", "color", "number"} | ({"background"} if demand.background else set())
    for field, other in neighbours(scene):
        if field in always:
            assert not demand.satisfied_by(other), (demand, other)
    # A size or a place counts for the object of which it is said.
    for obj, field in ((o, f) for o in scene.objects for f in ("size", "cell")):
        if all(getattr(mention, field) is not None for mention in demand.mentions):
            changed = [o for f, o in neighbours(scene) if f == field and obj not in o.objects]
            assert not any(demand.satisfied_by(other) for other in changed)


@pytest.mark.parametrize("field", ["size", "cell"])
def test_what_one_object_is_said_to_be_it_must_be(field: str):
    said = {"size": "a small red circle", "cell": "a red circle at the top left"}[field]
    for cell, size in product(range(len(CELLS)), SIZES):
        scene = Scene("gray", (Object(cell, "circle", "red", size),))
        wanted = size == "small" if field == "size" else cell == 0
        assert parse_caption(said).satisfied_by(scene) == wanted


@pytest.mark.parametrize(
    ("name", "first", "second"), [("above", 0, 2), ("below", 3, 1), ("left of", 2, 3), ("right of", 1, 0)]
)
def test_relations_hold_one_way(name: str, first: int, second: int):
    demand = parse_caption(f"a red circle {name} a blue square")
    for a, b in product(range(4), repeat=2):
        if a != b:
            scene = Scene("white", (Object(a, "circle", "red", "small"), Object(b, "square", "blue", "large")))
            # Each relation holds in two places: in either row, or in either column.
            shifted = {
                (first, second),
                (first ^ 1, second ^ 1) if name in ("above", "below") else (first ^ 2, second ^ 2),
            }
            assert demand.satisfied_by(scene) == ((a, b) in shifted), (a, b)


def test_captions_come_in_many_wordings():
    scene = random_scene(random.Random(0), objects=3)
    rng = random.Random(1)
    assert len({caption(scene, rng) for _ in range(200)}) > 50


def test_parsing_reads_every_part():
    demand = parse_caption("a big red circle in the top left corner and a little cross against a pink background.")
    mentions = (Mention("circle", "red", "large", 0), Mention("cross", None, "small", None))
    assert demand == Demand(mentions, "pink", None)


@pytest.mark.parametrize("text", ["", "a dog", "a red circle and a dog", "a red circle a blue square", "red circle"])
def test_other_words_are_refused(text: str):
    with pytest.raises(ValueError, match="cannot read"):
        parse_caption(text)


@worlds
def test_references_name_exactly_their_object(rng: random.Random):
    scene = random_scene(rng)
    for obj in scene.objects:
        described = references(scene, obj)
        assert described
        for text in described:
            (mention,) = parse_caption("a " + text.removeprefix("the ")).mentions
            assert [o for o in scene.objects if mention.fits(o)] == [obj]


@worlds
def test_answers_are_right(rng: random.Random):
    """Every question that one can answer from the scene by another way than its writer's is answered so."""
    scene = random_scene(rng)
    ask, answer = question(scene, rng)
    if ask.startswith("how many"):
        assert answer == NUMBERS[len(scene.objects)]
    elif "background" in ask:
        assert answer == scene.background
    elif ask.startswith("is there a"):
        mention = parse_caption(ask.removeprefix("is there ").rstrip("?")).mentions[0]
        assert answer == ("yes" if any(mention.fits(o) for o in scene.objects) else "no")
    elif ask.startswith("what is at the"):
        found = scene.at(CELLS.index(ask.removeprefix("what is at the ").rstrip("?")))
        assert answer == (f"a {found.size} {found.color} {found.shape}" if found else "nothing")
    else:
        mention = parse_caption("a " + ask.split(" is the ")[1].rstrip("?")).mentions[0]
        (obj,) = [o for o in scene.objects if mention.fits(o)]
        right = {"what colour": obj.color, "what size": obj.size, "where": f"at the {CELLS[obj.cell]}"}
        assert answer == right[ask.split(" is the ")[0]]
