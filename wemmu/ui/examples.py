"""Example requests for the miniature."""

from dataclasses import dataclass

from PIL import Image

from wemmu.shapes.render import render
from wemmu.shapes.scene import Object, Scene

_FIRST = Scene("white", (Object(0, "circle", "red", "large"), Object(3, "square", "blue", "large")))
_SECOND = Scene("white", (Object(1, "triangle", "green", "large"),))


@dataclass(frozen=True)
class Example:
    name: str
    text: str
    images: tuple[Image.Image, ...] = ()


def examples(px: int) -> list[Example]:
    """Return one example of each kind of request, with images of `px`."""
    first, second = render(_FIRST, px), render(_SECOND, px)
    return [
        Example("generate", "a red circle at the top left and a blue square at the bottom right"),
        Example(
            "three objects",
            "a small cyan square at the top left, a big purple circle at the top right "
            "and a red triangle at the bottom left",
        ),
        Example("edit", "make the circle green", (first,)),
        Example("move", "move the square to the top right", (first,)),
        Example("combine", "replace the circle with the object of the second image", (first, second)),
        Example("reconstruct", "", (first,)),
    ]
