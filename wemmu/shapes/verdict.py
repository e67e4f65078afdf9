"""Describes how a generated image fits its request, by the exact scorer."""

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from wemmu.shapes.instructions import target_of
from wemmu.shapes.language import full_caption, parse_caption
from wemmu.shapes.scene import Scene
from wemmu.shapes.scorer import read


@dataclass(frozen=True)
class Verdict:
    """right: whether the image shows what the request says; None if the request has no exact answer."""

    right: bool | None
    words: str


def verdict(image: Image.Image, text: str, inputs: Sequence[Image.Image]) -> Verdict:
    """Judge `image`, made of `text` and the input images."""
    seen = read(image).scene
    shown = f"shows {describe(seen)}" if seen else "shows no scene of the shapes world"
    try:
        right = seen is not None and _fits(seen, text, inputs)
    except ValueError as reason:
        return Verdict(None, f"{shown}. Not scored: {reason}")
    return Verdict(right, "as asked" if right else shown)


def describe(scene: Scene) -> str:
    return full_caption(scene) if scene.objects else f"an empty {scene.background} background"


def _fits(seen: Scene, text: str, inputs: Sequence[Image.Image]) -> bool:
    """Raise ValueError if the request has no exact answer."""
    if not inputs:
        if not text:
            raise ValueError("the request is empty")
        return parse_caption(text).satisfied_by(seen)
    scenes = [scene for image in inputs if (scene := read(image).scene)]
    if len(scenes) < len(inputs):
        raise ValueError("an input image is not a scene of the shapes world")
    return seen == (target_of(text, scenes) if text else scenes[0])
