"""The words of the miniature world, as its captions, edits and questions use them."""

import random
import re
from functools import cache

from wemmu.shapes.edits import EDITS, random_edit, random_two_image_edit
from wemmu.shapes.language import DESCRIBE, caption, question
from wemmu.shapes.scene import random_scene

# The name of the world in configs and exports.
WORLD = "shapes"
# Of each kind of text; a hundred say every word.
_DRAWS = 300


@cache
def words() -> frozenset[str]:
    """Return all words, collected from generated texts."""
    rng = random.Random("vocabulary")
    texts = [DESCRIBE]
    for _ in range(_DRAWS):
        scene = random_scene(rng, "train")
        texts += [caption(scene, rng), question(scene, rng)[0], random_two_image_edit(rng).instruction]
        texts += [random_edit(rng, kind=kind).instruction for kind in EDITS]
    return frozenset(word for text in texts for word in _split(text))


def unknown(text: str) -> list[str]:
    """Return the words of `text` that no training of the miniature contains."""
    return [word for word in dict.fromkeys(_split(text)) if word not in words()]


def _split(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text.lower())
