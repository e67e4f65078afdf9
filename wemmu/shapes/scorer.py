"""The exact scorer: reads a scene back from pixels and says what a generated image got right.

An image is read by comparing each of its four cells with the render of everything that can stand there, on each
background; the nearest explanation wins. Nearness is over all the pixels of a cell, so blur and noise move every
candidate alike and do not change the winner until they drown the shape. A cell that no candidate explains to within
`MAX_RMSE` makes the image unreadable, so that noise never scores by luck.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from wemmu.shapes.edits import Edit
from wemmu.shapes.language import Demand, parse_caption
from wemmu.shapes.render import cell_box, render, to_array
from wemmu.shapes.scene import BACKGROUNDS, CELLS, COLORS, SHAPES, SIZES, Object, Scene

# Root mean square error in [0, 1] units. A VAE-decoded render stays below 0.10 and one blurred by 2 px of 64 below
# 0.13; noise and cells that show two things at once are beyond it (tests/shapes/test_scorer.py holds both sides).
MAX_RMSE = 0.14


@dataclass(frozen=True)
class Reading:
    """`scene` is None if a cell matches no render; `rmse` is the error of the worst cell."""

    scene: Scene | None
    rmse: float


@lru_cache(maxsize=8)
def _templates(height: int, width: int) -> tuple[NDArray[np.float32], list[tuple[str, str, str] | None]]:
    """Renders of one cell: [background, candidate, pixels * 3] and the candidates (None is the empty cell)."""
    candidates = [None, *((shape, color, size) for shape in SHAPES for color in COLORS for size in SIZES)]
    rows, columns = cell_box(0, height, width)
    table = [
        [
            to_array(render(Scene(background, (Object(0, *c),) if c else ()), (height, width)))[rows, columns].ravel()
            for c in candidates
        ]
        for background in BACKGROUNDS
    ]
    return np.stack([np.stack(row) for row in table]), candidates


def read(image: Image.Image) -> Reading:
    """Read the scene that `image` (any even size from 16 px) shows."""
    pixels = to_array(image)
    height, width = pixels.shape[:2]
    templates, candidates = _templates(height, width)
    cells = np.stack([pixels[cell_box(cell, height, width)].ravel() for cell in range(len(CELLS))])
    # ||a - b||^2 = |a|^2 - 2ab + |b|^2, over [background, cell, candidate].
    error = (
        (cells**2).sum(-1)[None, :, None]
        - 2 * np.einsum("cp,bkp->bck", cells, templates)
        + (templates**2).sum(-1)[:, None, :]
    ) / cells.shape[1]
    background = int(error.min(axis=2).sum(axis=1).argmin())
    best = error[background].argmin(axis=1)
    rmse = float(np.sqrt(max(0.0, error[background].min(axis=1).max())))
    if rmse > MAX_RMSE:
        return Reading(None, rmse)
    objects = tuple(Object(cell, *candidates[k]) for cell, k in enumerate(best) if candidates[k] is not None)
    return Reading(Scene(tuple(BACKGROUNDS)[background], objects), rmse)


def caption_satisfied(image: Image.Image, caption: str | Demand) -> bool:
    """Return whether the image shows everything that the caption says, and no further object."""
    demand = parse_caption(caption) if isinstance(caption, str) else caption
    scene = read(image).scene
    return scene is not None and demand.satisfied_by(scene)


def same_scene(image: Image.Image, scene: Scene) -> bool:
    return read(image).scene == scene


@dataclass(frozen=True)
class EditScore:
    """The scores of an edit.

    followed: the part that the instruction names is as the target has it.
    preserved: every other cell, and the background unless it was the thing to change, is as in the source.
    copied: the image is the source again, that is, the instruction was ignored (task generalization collapse).
    """

    followed: bool
    preserved: bool
    copied: bool

    @property
    def correct(self) -> bool:
        return self.followed and self.preserved


def score_edit(image: Image.Image, edit: Edit) -> EditScore:
    """Compare the image with the edit's source and target, cell by cell."""
    scene = read(image).scene
    if scene is None:
        return EditScore(followed=False, preserved=False, copied=False)
    source, target = edit.sources[0], edit.target
    parts: list[tuple[object, object, object]] = [(scene.background, source.background, target.background)]
    parts += [(scene.at(cell), source.at(cell), target.at(cell)) for cell in range(len(CELLS))]
    followed = all(got == new for got, was, new in parts if was != new)
    preserved = all(got == was for got, was, new in parts if was == new)
    return EditScore(followed, preserved, copied=scene == source)
