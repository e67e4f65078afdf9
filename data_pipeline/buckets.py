"""Aspect-ratio buckets: the sizes of a resolution, and the bucket of an image."""

import math

from wemmu.config import ConfigError
from wemmu.config.prepare import ImageSizing

# (height, width) in pixels.
Size = tuple[int, int]


def buckets(resolution: int, sizing: ImageSizing) -> tuple[Size, ...]:
    """Return the sizes of about `resolution`^2 pixels with sides in multiples of `sizing.unit`, tallest first.

    Each height up to the resolution gets the width whose area is nearest. The set also has the transpose of each size,
    so it contains the square and is symmetric.

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
    found = set()
    for short in range(unit, resolution + 1, unit):
        long = max(short, round(resolution**2 / short / unit) * unit)
        if long / short <= sizing.max_aspect:
            found |= {(short, long), (long, short)}
    return tuple(sorted(found, key=lambda size: size[1] / size[0]))


def nearest(size: Size, choices: tuple[Size, ...]) -> Size:
    """Return the bucket with the nearest aspect ratio, on a logarithmic scale."""
    wanted = math.log(size[1] / size[0])
    return min(choices, key=lambda bucket: abs(math.log(bucket[1] / bucket[0]) - wanted))


def enlargement(size: Size, bucket: Size) -> float:
    """Return the factor that scales an image of `size` to cover `bucket`; above 1 it enlarges."""
    return max(bucket[0] / size[0], bucket[1] / size[1])


def cut(size: Size, bucket: Size) -> float:
    """Return the share of an image's area that is cropped when it fills `bucket`."""
    kept = bucket[0] * bucket[1] / enlargement(size, bucket) ** 2
    return 1 - kept / (size[0] * size[1])
