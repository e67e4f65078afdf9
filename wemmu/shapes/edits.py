"""Edits of one or two images: the instruction in words, and the scene that must result."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from wemmu.shapes.language import references
from wemmu.shapes.scene import (
    BACKGROUNDS,
    CELLS,
    COLORS,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    Split,
    random_object,
    random_scene,
)

TWO_IMAGE_WORDINGS = (
    "replace {} with the object of the second image",
    "put the object of the second image in place of {}",
)


@dataclass(frozen=True)
class Edit:
    """`instruction` applied to `sources` (one or two scenes) must give `target`."""

    kind: str
    sources: tuple[Scene, ...]
    instruction: str
    target: Scene


def swap(scene: Scene, old: Object, new: Object | None) -> Scene:
    """Replace an object of a scene, or take it away."""
    kept = tuple(o for o in scene.objects if o is not old)
    return replace(scene, objects=kept + ((new,) if new else ()))


def _other(rng: random.Random, choices: tuple[str, ...], current: str) -> str:
    return rng.choice([choice for choice in choices if choice != current])


def _recolor(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    obj = rng.choice(scene.objects)
    color = _other(rng, tuple(COLORS), obj.color)
    wording = rng.choice(("make {} {}", "paint {} {}", "change the colour of {} to {}"))
    return wording.format(rng.choice(references(scene, obj)), color), swap(scene, obj, replace(obj, color=color))


def _reshape(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    obj = rng.choice(scene.objects)
    shape = _other(rng, SHAPES, obj.shape)
    wording = rng.choice(("turn {} into a {}", "replace {} with a {}"))
    return wording.format(rng.choice(references(scene, obj)), shape), swap(scene, obj, replace(obj, shape=shape))


def _resize(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    obj = rng.choice(scene.objects)
    size = _other(rng, SIZES, obj.size)
    word = rng.choice({"large": ("large", "bigger"), "small": ("small", "smaller")}[size])
    return f"make {rng.choice(references(scene, obj))} {word}", swap(scene, obj, replace(obj, size=size))


def _move(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    obj = rng.choice(scene.objects)
    cell = rng.choice(scene.free_cells)
    text = f"move {rng.choice(references(scene, obj))} to the {CELLS[cell]}"
    return text, swap(scene, obj, replace(obj, cell=cell))


def _add(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    if len(scene.objects) == MAX_OBJECTS:
        return None
    new = random_object(rng, rng.choice(scene.free_cells))
    return (
        f"{rng.choice(('add', 'put'))} a {new.size} {new.color} {new.shape} at the {CELLS[new.cell]}",
        replace(scene, objects=(*scene.objects, new)),
    )


def _remove(scene: Scene, rng: random.Random) -> tuple[str, Scene] | None:
    if len(scene.objects) == 1:
        return None
    obj = rng.choice(scene.objects)
    return f"{rng.choice(('remove', 'delete'))} {rng.choice(references(scene, obj))}", swap(scene, obj, None)


def _background(scene: Scene, rng: random.Random) -> tuple[str, Scene]:
    background = _other(rng, tuple(BACKGROUNDS), scene.background)
    wording = rng.choice(("make the background {}", "change the background to {}"))
    return wording.format(background), replace(scene, background=background)


# None means that the scene does not admit the edit.
EDITS: dict[str, Callable[[Scene, random.Random], tuple[str, Scene] | None]] = {
    "recolor": _recolor,
    "reshape": _reshape,
    "resize": _resize,
    "move": _move,
    "add": _add,
    "remove": _remove,
    "background": _background,
}


def random_edit(rng: random.Random, split: Split = "train", kind: str | None = None) -> Edit:
    """Draw a single-image edit whose source and target both belong to `split`; `kind` is a key of `EDITS` or any."""
    if kind is not None and kind not in EDITS:
        raise ValueError(f"unknown edit {kind!r}; valid choices: {', '.join(EDITS)}")
    chosen = kind or rng.choice(tuple(EDITS))
    while True:
        # In the composition split the edit itself must make the unseen pair, out of a source that may be ordinary.
        scene = random_scene(rng, rng.choice(("train", "test")) if split == "composition" else split)
        result = EDITS[chosen](scene, rng)
        if result is not None and result[1].split == split:
            return Edit(chosen, (scene,), *result)
        if result is not None and split == "composition" and chosen not in ("recolor", "reshape", "add"):
            chosen = rng.choice(("recolor", "reshape", "add"))


def random_two_image_edit(rng: random.Random, split: Split = "train") -> Edit:
    """Draw an edit that replaces an object of image 1 by the single object of image 2."""
    while True:
        first = random_scene(rng, "test" if split == "composition" else split)
        second = random_scene(rng, split, objects=1)
        old, new = rng.choice(first.objects), second.objects[0]
        target = swap(first, old, replace(new, cell=old.cell))
        if target != first and target.split == split:
            wording = rng.choice(TWO_IMAGE_WORDINGS)
            return Edit("replace", (first, second), wording.format(rng.choice(references(first, old))), target)


def edits_with_object(first: Scene, second: Scene) -> Iterator[Edit]:
    """Yield every two-image edit of these scenes, in every wording."""
    for old in first.objects:
        target = swap(first, old, replace(second.objects[0], cell=old.cell))
        for reference, wording in product(references(first, old), TWO_IMAGE_WORDINGS):
            yield Edit("replace", (first, second), wording.format(reference), target)
