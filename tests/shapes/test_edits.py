"""Every edit changes exactly what its words say."""

import random
import re
from dataclasses import replace

import pytest

from tests.shapes.worlds import worlds
from wemmu.shapes.edits import EDITS, Edit, random_edit, random_two_image_edit
from wemmu.shapes.language import parse_caption
from wemmu.shapes.scene import BACKGROUNDS, CELLS, COLORS, HELD_OUT, SHAPES, Object, Scene

SPLITS = ("train", "test", "composition")


def named(scene: Scene, instruction: str) -> list[Object]:
    """The objects of the scene that fit the first thing the instruction calls `the ...`."""
    kinds = "|".join(SHAPES)
    (reference,) = re.findall(rf"the ((?:\w+ ){{0,2}}(?:{kinds})(?: at the (?:{'|'.join(CELLS)}))?)", instruction)[:1]
    (mention,) = parse_caption(f"a {reference}").mentions
    return [o for o in scene.objects if mention.fits(o)]


def carried_out(edit: Edit) -> Scene:
    """The target that the WORDS of an edit describe, by a reading of them that shares nothing with their writing."""
    source, words = edit.sources[0], edit.instruction
    if edit.kind == "background":
        return replace(source, background=next(b for b in BACKGROUNDS if words.endswith(b)))
    if edit.kind == "add":
        (mention,) = parse_caption(words[words.index(" a ") + 1 :]).mentions
        return replace(
            source, objects=(*source.objects, Object(mention.cell, mention.shape, mention.color, mention.size))
        )
    (obj,) = named(source, words)
    others = tuple(o for o in source.objects if o != obj)
    match edit.kind:
        case "remove":
            return replace(source, objects=others)
        case "recolor":
            new = replace(obj, color=next(c for c in COLORS if words.endswith(f" {c}")))
        case "reshape":
            new = replace(obj, shape=next(s for s in SHAPES if words.endswith(f" a {s}")))
        case "resize":
            new = replace(obj, size="large" if words.endswith((" large", " bigger")) else "small")
        case "move":
            new = replace(obj, cell=next(i for i, c in enumerate(CELLS) if words.endswith(f"to the {c}")))
        case "replace":
            new = replace(edit.sources[1].objects[0], cell=obj.cell)
    return replace(source, objects=(*others, new))


@pytest.mark.parametrize("kind", EDITS)
@worlds
def test_target_is_what_the_words_say(kind: str, rng: random.Random):
    edit = random_edit(rng, rng.choice(("train", "test")), kind)
    assert edit.kind == kind
    assert edit.target == carried_out(edit)
    assert edit.target != edit.sources[0]


@worlds
def test_two_image_target_is_what_the_words_say(rng: random.Random):
    edit = random_two_image_edit(rng, rng.choice(SPLITS))
    assert edit.target == carried_out(edit)
    assert edit.target != edit.sources[0]
    assert len(edit.sources[1].objects) == 1


@worlds
def test_instruction_names_exactly_one_object(rng: random.Random):
    edit = random_edit(rng, kind=rng.choice([k for k in EDITS if k not in ("add", "background")]))
    assert len(named(edit.sources[0], edit.instruction)) == 1
    two = random_two_image_edit(rng)
    assert len(named(two.sources[0], two.instruction)) == 1


@pytest.mark.parametrize("split", ["train", "test"])
@worlds
def test_sources_and_target_are_all_of_the_split(split: str, rng: random.Random):
    for edit in (random_edit(rng, split), random_two_image_edit(rng, split)):
        assert {scene.split for scene in (*edit.sources, edit.target)} == {split}


@worlds
def test_composition_edits_make_the_unseen_pair_themselves(rng: random.Random):
    edit = random_edit(rng, "composition", rng.choice((None, *EDITS)))
    made = {(o.color, o.shape) for o in edit.target.objects} - {(o.color, o.shape) for o in edit.sources[0].objects}
    assert made & HELD_OUT
    assert edit.sources[0].split != "composition"
    two = random_two_image_edit(rng, "composition")
    assert {(o.color, o.shape) for o in two.target.objects} & HELD_OUT


def test_unknown_edit_is_refused():
    with pytest.raises(ValueError, match="valid choices: recolor"):
        random_edit(random.Random(0), kind="rotate")
