"""Scene <-> words: captions in several wordings, what a caption demands of an image, questions with answers."""

import random
import re
from dataclasses import dataclass
from itertools import permutations

from wemmu.shapes.scene import BACKGROUNDS, CELLS, COLORS, SHAPES, SIZES, Object, Scene

SIZE_WORDS = {"large": ("large", "big"), "small": ("small", "little")}
NUMBERS = ("no", "one", "two", "three", "four")
# (row difference, column difference) of the first object seen from the second.
RELATIONS = {"above": (-1, 0), "below": (1, 0), "left of": (0, -1), "right of": (0, 1)}
# Every object with its place; no places; the place of one object relative to another beside it.
WORDINGS = ("placed", "unplaced", "related")


@dataclass(frozen=True)
class Mention:
    """What a caption says about one object; None for properties that it does not name."""

    shape: str
    color: str | None = None
    size: str | None = None
    cell: int | None = None

    def fits(self, obj: Object) -> bool:
        said = (self.shape, self.color, self.size, self.cell)
        return all(a is None or a == b for a, b in zip(said, (obj.shape, obj.color, obj.size, obj.cell), strict=True))


@dataclass(frozen=True)
class Demand:
    """Everything that a caption demands: exactly these objects, their positions and the background.

    `relation` is `(i, name, j)`: mention i stands `name` mention j.
    """

    mentions: tuple[Mention, ...]
    background: str | None = None
    relation: tuple[int, str, int] | None = None

    def satisfied_by(self, scene: Scene) -> bool:
        if len(scene.objects) != len(self.mentions) or self.background not in (None, scene.background):
            return False
        return any(self._holds(order) for order in permutations(scene.objects))

    def _holds(self, objects: tuple[Object, ...]) -> bool:
        if not all(mention.fits(obj) for mention, obj in zip(self.mentions, objects, strict=True)):
            return False
        if self.relation is None:
            return True
        i, name, j = self.relation
        return _offset(objects[i], objects[j]) == RELATIONS[name]


def _offset(a: Object, b: Object) -> tuple[int, int]:
    return a.cell // 2 - b.cell // 2, a.cell % 2 - b.cell % 2


# ---------------------------------------------------------------------------------------------------- captions
# The question whose answer describes the whole scene.
DESCRIBE = "describe the image"


def full_caption(scene: Scene) -> str:
    """Return the canonical wording that says everything; the scorer and the VLM use it."""
    return _join([_phrase(o, o.size, o.color, f"at the {CELLS[o.cell]}") for o in scene.objects]) + (
        f" on a {scene.background} background"
    )


def brief_caption(scene: Scene, rng: random.Random) -> str:
    """Draw a caption in the canonical wording that leaves out each attribute with probability one half."""

    def said(word: str) -> str | None:
        return word if rng.random() < 0.5 else None

    phrases = [_phrase(o, said(o.size), said(o.color), said(f"at the {CELLS[o.cell]}")) for o in scene.objects]
    return _join(phrases) + (said(f" on a {scene.background} background") or "")


def caption(scene: Scene, rng: random.Random, wording: str | None = None) -> str:
    """Draw one of many wordings: mentions may be reordered, say less, or relate two objects to each other.

    Raises:
        ValueError: if no caption in `wording` fits the scene; lists the wordings that fit.
    """
    if wording is not None and wording not in wordings(scene):
        raise ValueError(
            f"no caption with the wording {wording} fits this scene; valid choices: {', '.join(wordings(scene))}"
        )
    related = wording == "related" or (wording is None and len(scene.objects) == 2 and rng.random() < 0.4)
    if related:
        a, b = rng.sample(scene.objects, 2)
        name = next((n for n, offset in RELATIONS.items() if offset == _offset(a, b)), None)
        if name is not None:
            text = f"{_loose(a, rng)} {name} {_loose(b, rng)}"
            return text + _background(scene, rng)
    objects = rng.sample(scene.objects, len(scene.objects))
    place = rng.choice(("at the {}", "in the {} corner"))
    with_place = rng.random() < 0.85 if wording is None else wording == "placed"
    phrases = [_loose(o, rng, place.format(CELLS[o.cell]) if with_place else None) for o in objects]
    return _join(phrases) + _background(scene, rng)


def wordings(scene: Scene) -> tuple[str, ...]:
    """Return the wordings that can describe a scene."""
    side_by_side = len(scene.objects) == 2 and _offset(*scene.objects) in RELATIONS.values()
    return WORDINGS if side_by_side else ("placed", "unplaced")


def _loose(obj: Object, rng: random.Random, place: str | None = None) -> str:
    size = rng.choice(SIZE_WORDS[obj.size]) if rng.random() < 0.7 else None
    return _phrase(obj, size, obj.color, place)


def _phrase(obj: Object, size: str | None, color: str | None, place: str | None) -> str:
    return " ".join(word for word in ("a", size, color, obj.shape, place) if word)


def _background(scene: Scene, rng: random.Random) -> str:
    if rng.random() < 0.2:
        return ""
    return f" {rng.choice(('on', 'against'))} a {scene.background} background"


def _join(phrases: list[str]) -> str:
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


# ------------------------------------------------------------------------------------------------------ parsing
_SIZE_OF = {word: size for size, words in SIZE_WORDS.items() for word in words}
_MENTION = re.compile(
    rf"a (?:({'|'.join(_SIZE_OF)}) )?(?:({'|'.join(COLORS)}) )?({'|'.join(SHAPES)})"
    rf"(?: (?:at|in) the ({'|'.join(CELLS)})(?: corner)?)?"
)
_BACKGROUND = re.compile(rf" ?(?:on|against) a ({'|'.join(BACKGROUNDS)}) background$")


def parse_caption(text: str) -> Demand:
    """Read a caption back into what it demands of an image.

    Raises:
        ValueError: if the text is not in the world's language, naming the words that were not understood.
    """
    rest = text.strip().lower().rstrip(".")
    background = None
    if found := _BACKGROUND.search(rest):
        background, rest = found[1], rest[: found.start()]
    mentions = [
        Mention(m[3], m[2], _SIZE_OF.get(m[1] or ""), CELLS.index(m[4]) if m[4] else None)
        for m in _MENTION.finditer(rest)
    ]
    glue = _MENTION.sub("#", rest)
    relation = next(((0, name, 1) for name in RELATIONS if glue == f"# {name} #"), None)
    if not mentions or (relation is None and not re.fullmatch(r"#(, #)*( and #)?", glue)):
        raise ValueError(
            f"cannot read {text!r} as a caption of the shapes world (what remains of it: {glue!r}). A caption names "
            f"shapes ({', '.join(SHAPES)}) with colours ({', '.join(COLORS)}), sizes ({', '.join(SIZES)}) and places "
            f"({', '.join(CELLS)}), or puts one {' / '.join(RELATIONS)} another, then 'on a ... background' "
            f"({', '.join(BACKGROUNDS)})."
        )
    return Demand(tuple(mentions), background, relation)


# ---------------------------------------------------------------------------------------------------- reference
def references(scene: Scene, obj: Object) -> list[str]:
    """Return every description ("the red circle") that fits `obj` and no other object of the scene, shortest first."""
    candidates = [
        (f"the {obj.shape}", Mention(obj.shape)),
        (f"the {obj.color} {obj.shape}", Mention(obj.shape, obj.color)),
        (f"the {obj.size} {obj.shape}", Mention(obj.shape, None, obj.size)),
        (f"the {obj.size} {obj.color} {obj.shape}", Mention(obj.shape, obj.color, obj.size)),
        (f"the {obj.shape} at the {CELLS[obj.cell]}", Mention(obj.shape, None, None, obj.cell)),
    ]
    return [text for text, mention in candidates if [o for o in scene.objects if mention.fits(o)] == [obj]]


# ---------------------------------------------------------------------------------------------------- questions
def question(scene: Scene, rng: random.Random) -> tuple[str, str]:
    """Draw a question about the scene and its one correct answer."""
    kind = rng.choice(("background", "count", "cell", "exists", "color", "where", "size"))
    obj = rng.choice(scene.objects)
    reference = rng.choice(references(scene, obj))
    shape_reference = f"the {obj.shape}"
    by_shape = shape_reference in references(scene, obj)
    match kind:
        case "background":
            return "what colour is the background?", scene.background
        case "count":
            return "how many shapes are there?", NUMBERS[len(scene.objects)]
        case "cell":
            cell = rng.randrange(len(CELLS))
            found = scene.at(cell)
            return (
                f"what is at the {CELLS[cell]}?",
                f"a {found.size} {found.color} {found.shape}" if found else "nothing",
            )
        case "exists":
            color, shape = rng.choice(tuple(COLORS)), rng.choice(SHAPES)
            if rng.random() < 0.5:
                color, shape = obj.color, obj.shape
            present = any((o.color, o.shape) == (color, shape) for o in scene.objects)
            return f"is there a {color} {shape}?", "yes" if present else "no"
        case "color" if by_shape:
            return f"what colour is {shape_reference}?", obj.color
        case "size" if by_shape:
            return f"what size is {shape_reference}?", obj.size
        case _ if "at the" not in reference:
            return f"where is {reference}?", f"at the {CELLS[obj.cell]}"
        case _:
            return "how many shapes are there?", NUMBERS[len(scene.objects)]
