"""The content of a scene as classes for linear heads in pre-training."""

import torch
from torch import Tensor

from wemmu.shapes.scene import BACKGROUNDS, CELLS, COLORS, SHAPES, SIZES, Object, Scene

# Attribute of a cell -> its classes; the first is that of an empty cell.
CHOICES = {"shape": ("", *SHAPES), "color": ("", *COLORS), "size": ("", *SIZES)}
CLASSES = {**{name: len(choices) for name, choices in CHOICES.items()}, "background": len(BACKGROUNDS)}


def attributes(scenes: list[Scene]) -> dict[str, Tensor]:
    """Return name -> classes [B, 4] of the cells; for the background [B, 1]."""
    found = {
        name: torch.tensor([[_class(scene.at(c), name) for c in range(len(CELLS))] for scene in scenes])
        for name in CHOICES
    }
    return found | {"background": torch.tensor([[list(BACKGROUNDS).index(s.background)] for s in scenes])}


def cells(side: int) -> Tensor:
    """Return the cell of each token or patch of a square grid, row by row: [side * side]."""
    at = torch.arange(side) * 2 // side
    return (2 * at[:, None] + at).flatten()


def _class(obj: Object | None, name: str) -> int:
    return CHOICES[name].index(getattr(obj, name)) if obj else 0
