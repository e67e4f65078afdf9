"""An instruction in the miniature's language and its inputs -> the resulting scene: the inverse of `edits`."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from wemmu.shapes.edits import edits_with_object, swap
from wemmu.shapes.language import Mention
from wemmu.shapes.scene import BACKGROUNDS, CELLS, COLORS, SHAPES, SIZES, Object, Scene

_SIZE_OF = {"large": "large", "bigger": "large", "small": "small", "smaller": "small"}
_COLOR, _SHAPE, _CELL, _SIZE = ("|".join(names) for names in (COLORS, SHAPES, CELLS, SIZES))
# As `language.references` names an object.
_THE = rf"the (?:(?P<size>{_SIZE}) )?(?:(?P<color>{_COLOR}) )?(?P<shape>{_SHAPE})(?: at the (?P<cell>{_CELL}))?"
# The field that changes of the object that is named, and how that is said.
_CHANGES = (
    ("color", rf"(?:make|paint) {_THE} (?P<new>{_COLOR})"),
    ("color", rf"change the colou?r of {_THE} to (?P<new>{_COLOR})"),
    ("shape", rf"turn {_THE} into a (?P<new>{_SHAPE})"),
    ("shape", rf"replace {_THE} with a (?P<new>{_SHAPE})"),
    ("size", rf"make {_THE} (?P<new>{'|'.join(_SIZE_OF)})"),
    ("cell", rf"move {_THE} to the (?P<new>{_CELL})"),
)
_REMOVAL = rf"(?:remove|delete) {_THE}"
_ADDITION = rf"(?:add|put) a (?P<size>{_SIZE}) (?P<color>{_COLOR}) (?P<shape>{_SHAPE}) at the (?P<cell>{_CELL})"
_NEW_BACKGROUND = rf"(?:make|change) the background (?:to )?(?P<new>{'|'.join(BACKGROUNDS)})"


def target_of(instruction: str, scenes: Sequence[Scene]) -> Scene:
    """Apply `instruction` to one scene, or to the first of two, and return the resulting scene.

    Raises:
        ValueError: if the instruction is not in the world's language, or names no object, several, or a cell in use.
    """
    text = instruction.strip().lower().rstrip(".")
    if len(scenes) == 2:
        found = (edit.target for edit in edits_with_object(*scenes) if edit.instruction == text)
        if (target := next(found, None)) is not None:
            return target
    elif len(scenes) == 1:
        return _edited(text, scenes[0])
    raise ValueError(f"{instruction!r} is not an edit of these images in the shapes world")


def _edited(text: str, scene: Scene) -> Scene:
    if said := re.fullmatch(_NEW_BACKGROUND, text):
        return replace(scene, background=said["new"])
    if said := re.fullmatch(_ADDITION, text):
        new = Object(CELLS.index(said["cell"]), said["shape"], said["color"], said["size"])
        return _with(scene, new)
    if said := re.fullmatch(_REMOVAL, text):
        return swap(scene, _named(scene, said), None)
    for field, pattern in _CHANGES:
        if said := re.fullmatch(pattern, text):
            old, value = _named(scene, said), said["new"]
            values: dict[str, Any] = (
                {"cell": CELLS.index(value)} if field == "cell" else {field: _SIZE_OF.get(value, value)}
            )
            return _with(swap(scene, old, None), replace(old, **values))
    raise ValueError(f"{text!r} is not an edit of one image in the shapes world")


def _with(scene: Scene, obj: Object) -> Scene:
    if scene.at(obj.cell):
        raise ValueError(f"the {CELLS[obj.cell]} of the image is not free")
    return replace(scene, objects=(*scene.objects, obj))


def _named(scene: Scene, said: re.Match[str]) -> Object:
    cell = CELLS.index(said["cell"]) if said["cell"] else None
    mention = Mention(said["shape"], said["color"], said["size"], cell)
    fitting = [obj for obj in scene.objects if mention.fits(obj)]
    if len(fitting) != 1:
        count = "no object" if not fitting else f"{len(fitting)} objects"
        raise ValueError(f"{said[0]!r} means {count} of the image")
    return fitting[0]
