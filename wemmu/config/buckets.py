"""Aspect-ratio buckets: the sizes of a resolution, and the bucket of an image.

Writing shards and sampling share these rules (docs/data.md, "Sizes").
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wemmu.config.base import ConfigError
from wemmu.config.prepare import ImageSizing

# (height, width) in pixels.
Size = tuple[int, int]
# An input that has the output's shape up to this share of its area takes the output's bucket: the two stay aligned.
SAME_SHAPE = 0.05


def buckets(resolution: int, sizing: ImageSizing) -> tuple[Size, ...]:
    """Return the sizes of about `resolution`^2 pixels with sides in multiples of `sizing.unit`, tallest first.

    Raises:
        ConfigError: if the resolution is not a multiple of the unit.
    """
    unit = sizing.unit
    if resolution % unit:
        below, above = resolution // unit * unit, -(-resolution // unit) * unit
        raise ConfigError(
            f"the resolution {resolution} is not a multiple of data.prepare.images.unit, {unit} px; the nearest are "
            + " and ".join(str(r) for r in (below, above) if r)
        )
    return of_area(resolution**2, unit, sizing.max_aspect)


def of_area(area: int, unit: int, max_aspect: float) -> tuple[Size, ...]:
    """Return the sizes of about `area` pixels, tallest first.

    Each height up to the square's gets the width whose area is nearest. The set also has the transpose of each size,
    so it contains the square and is symmetric.
    """
    found = set()
    square = max(1, round(math.sqrt(area) / unit)) * unit
    for short in range(unit, square + 1, unit):
        long = max(short, round(area / short / unit) * unit)
        if long / short <= max_aspect:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found, key=lambda size: size[1] / size[0]))


def nearest(size: Size, choices: Sequence[Size]) -> Size:
    """Return the bucket with the nearest aspect ratio, on a logarithmic scale."""
    aspect = math.log(size[1] / size[0])
    return min(choices, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - aspect))


def beside(size: Size, like: Size, output: Size, choices: Sequence[Size]) -> Size:
    """Return the bucket of an input of `size` whose output has the shape of `like` and the bucket `output`."""
    return output if cut(size, like) <= SAME_SHAPE else nearest(size, choices)


def enlargement(size: Size, bucket: Size) -> float:
    """Return the factor that scales an image of `size` to cover `bucket`; above 1 it enlarges."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def cut(size: Size, bucket: Size) -> float:
    """Return the share of an image's area that is cropped when it fills `bucket`."""
    kept = bucket[0] * bucket[1] / enlargement(size, bucket) ** 2
    return 1 - kept / (size[0] * size[1])


@dataclass(frozen=True)
class RequestSizes:
    """How a model sizes the images of a request.

    side: px of the square that has its number of pixels. unit: px, of which all sides are multiples. max_aspect: of the
    images that it was trained on. largest: px, the longest side that it can generate.
    """

    side: int
    unit: int
    max_aspect: float
    largest: int

    def of(self, inputs: Sequence[Size], requested: Size | None = None) -> tuple[Size, list[Size]]:
        """Return the size of the output and of each input, which are scaled to cover it and cropped evenly.

        The output has the size `requested` or the aspect ratio of the first input. Each input keeps its own aspect
        ratio and gets as many pixels as the output.
        """
        output = like = requested or (self.side, self.side)
        if inputs and not requested:
            output, like = nearest(inputs[0], self._choices(output, self.max_aspect)), inputs[0]
        choices = self._choices(output, max(self.max_aspect, max(output) / min(output)))
        return output, [beside(size, like, output, choices) for size in inputs]

    def problem(self, size: Size) -> str:
        """Say why an image of this size cannot be generated; empty if it can."""
        for name, side in zip(("height", "width"), size, strict=True):
            if side > self.largest:
                return f"{name} is {side} px; the largest that this model generates is {self.largest} px"
        odd = any(side % self.unit for side in size)
        return f"height and width must be multiples of {self.unit} px, got {size}" * odd

    def _choices(self, size: Size, max_aspect: float) -> list[Size]:
        found = of_area(size[0] * size[1], self.unit, max_aspect)
        return [one for one in found if max(one) <= self.largest] or [size]


def cropped(inputs: Sequence[Size], sizes: Sequence[Size]) -> Iterator[str]:
    """Yield a warning for each input that loses more than its aspect ratio's rounding."""
    for number, (given, size) in enumerate(zip(inputs, sizes, strict=True), 1):
        if (lost := cut(given, size)) > SAME_SHAPE:
            yield (
                f"input image {number} of {given[0]} x {given[1]} px (height x width) becomes {size[0]} x {size[1]} px "
                f"and loses {lost:.0%} at its edges; pad it to that shape to keep all of it"
            )
