"""The bucket rule, for any resolution, unit and image."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wemmu.config import ConfigError
from wemmu.config.buckets import Size, buckets, cut, enlargement, nearest
from wemmu.config.prepare import ImageSizing

units = st.sampled_from([8, 14, 16, 28, 32, 64])
aspects = st.floats(1, 4)
sizes = st.tuples(st.integers(1, 8000), st.integers(1, 8000))


@st.composite
def sets(draw: st.DrawFn) -> tuple[int, ImageSizing, tuple[Size, ...]]:
    images = ImageSizing(unit=draw(units), max_aspect=draw(aspects))
    resolution = images.unit * draw(st.integers(1, 40))
    return resolution, images, buckets(resolution, images)


@given(sets())
def test_every_side_is_a_multiple_of_the_unit_and_none_is_more_oblong_than_allowed(made: tuple) -> None:
    _, images, found = made
    for height, width in found:
        assert height % images.unit == 0 < height
        assert width % images.unit == 0 < width
        assert max(height, width) / min(height, width) <= images.max_aspect


@given(sets())
def test_areas_differ_from_the_square_by_at_most_half_a_unit_of_its_side(made: tuple) -> None:
    resolution, images, found = made
    for height, width in found:
        assert abs(height * width / resolution**2 - 1) <= images.unit / (2 * resolution) + 1e-12


@given(sets())
def test_the_square_is_always_in_and_every_bucket_has_its_mirror_image(made: tuple) -> None:
    resolution, _, found = made
    assert (resolution, resolution) in found
    assert set(found) == {(width, height) for height, width in found}
    assert len(set(found)) == len(found)
    assert list(found) == sorted(found, key=lambda size: size[1] / size[0])


@given(sets(), sizes)
def test_no_bucket_is_nearer_in_aspect_ratio_than_the_nearest(made: tuple, size: Size) -> None:
    found = made[2]

    def distance(bucket: Size) -> float:
        return abs(math.log(bucket[1] / bucket[0]) - math.log(size[1] / size[0]))

    chosen = nearest(size, found)
    assert chosen in found
    assert distance(chosen) == min(map(distance, found))


@given(sets(), st.integers(1, 5), st.data())
def test_an_image_with_the_shape_of_a_bucket_goes_to_it_and_loses_nothing(
    made: tuple, times: int, data: st.DataObject
) -> None:
    bucket = data.draw(st.sampled_from(made[2]))
    size = (bucket[0] * times, bucket[1] * times)
    assert nearest(size, made[2]) == bucket
    assert math.isclose(enlargement(size, bucket), 1 / times)
    assert math.isclose(cut(size, bucket), 0, abs_tol=1e-9)


@given(sizes, sizes)
def test_an_enlarged_image_just_covers_its_bucket(size: Size, bucket: Size) -> None:
    scale = enlargement(size, bucket)
    covered = [side * scale / wanted for side, wanted in zip(size, bucket, strict=True)]
    assert math.isclose(min(covered), 1)
    assert math.isclose(cut(size, bucket), 1 - 1 / max(covered), abs_tol=1e-9)


def test_a_resolution_that_does_not_fit_the_unit_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match=r"500 .* 32 px; the nearest are 480 and 512"):
        buckets(500, ImageSizing(unit=32))
    with pytest.raises(ConfigError, match="the nearest are 32"):
        buckets(20, ImageSizing(unit=32))
