"""Scenes of the miniature world: one to three coloured shapes in the four cells of a coloured background.

A scene is data. The image (`render`), the captions and questions (`language`) and the edits (`edits`) are all
derived from it, and the scorer reads it back from pixels, so that every score of the miniature is exact.
"""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

SHAPES = ("circle", "square", "triangle", "cross")
COLORS = {
    "red": (222, 40, 40),
    "green": (36, 160, 60),
    "blue": (40, 80, 225),
    "yellow": (240, 208, 30),
    "purple": (145, 45, 185),
    "cyan": (50, 205, 220),
}
SIZES = ("large", "small")
BACKGROUNDS = {"white": (246, 246, 246), "black": (16, 16, 16), "gray": (128, 128, 128), "pink": (250, 182, 200)}
# Row-major: the cell index is 2 * row + column.
CELLS = ("top left", "top right", "bottom left", "bottom right")
MAX_OBJECTS = 3

# Pairs that no training scene contains: a model that draws them has composed what it learnt about the parts.
HELD_OUT = frozenset({("purple", "cross"), ("yellow", "triangle")})
TEST_SHARE = 0.1

Split = Literal["train", "test", "composition"]


@dataclass(frozen=True, order=True)
class Object:
    """One shape. `cell` is an index into `CELLS`; the other fields are keys of the tables above."""

    cell: int
    shape: str
    color: str
    size: str

    def __post_init__(self) -> None:
        for name, value, valid in (
            ("cell", self.cell, range(len(CELLS))),
            ("shape", self.shape, SHAPES),
            ("color", self.color, tuple(COLORS)),
            ("size", self.size, SIZES),
        ):
            if value not in valid:
                raise ValueError(f"Object.{name} is {value!r}; valid choices: {', '.join(map(str, valid))}")


@dataclass(frozen=True)
class Scene:
    """A background and its objects, at most one to a cell, kept in the order of their cells."""

    background: str
    objects: tuple[Object, ...]

    def __post_init__(self) -> None:
        if self.background not in BACKGROUNDS:
            raise ValueError(f"Scene.background is {self.background!r}; valid choices: {', '.join(BACKGROUNDS)}")
        cells = [o.cell for o in self.objects]
        if len(set(cells)) != len(cells):
            raise ValueError(f"two objects share a cell: {self.objects}")
        object.__setattr__(self, "objects", tuple(sorted(self.objects)))

    def at(self, cell: int) -> Object | None:
        return next((o for o in self.objects if o.cell == cell), None)

    @property
    def free_cells(self) -> list[int]:
        return [cell for cell in range(len(CELLS)) if self.at(cell) is None]

    @property
    def split(self) -> Split:
        """The split this scene belongs to: a property of its content, so that splits cannot overlap."""
        if any((o.color, o.shape) in HELD_OUT for o in self.objects):
            return "composition"
        digest = hashlib.blake2b(repr(self).encode(), digest_size=8).digest()
        return "test" if int.from_bytes(digest) < TEST_SHARE * 2**64 else "train"


def random_object(rng: random.Random, cell: int) -> Object:
    return Object(cell, rng.choice(SHAPES), rng.choice(tuple(COLORS)), rng.choice(SIZES))


def random_scene(rng: random.Random, split: Split = "train", objects: int | None = None) -> Scene:
    """Draw a scene of `split` with `objects` shapes (1 to 3; uniformly many when None)."""
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; valid choices: {', '.join(get_args(Split))}")
    for scene in _proposals(rng, objects):
        if scene.split == split:
            return scene
    raise AssertionError("proposals never end")


def _proposals(rng: random.Random, objects: int | None) -> Iterator[Scene]:
    while True:
        cells = rng.sample(range(len(CELLS)), objects or rng.randint(1, MAX_OBJECTS))
        yield Scene(rng.choice(tuple(BACKGROUNDS)), tuple(random_object(rng, cell) for cell in cells))
