"""Charts put every number where it belongs, whatever numbers come."""

import math
import re

import pytest

from tests.report.pages import Page
from wemmu.report.charts import BOTTOM, LEFT, POINTS, RIGHT, TOP, Line, chart

STEPS = list(range(0, 1001, 10))
CURVES = [
    [0.0] * 101,
    [1e-5 * step for step in STEPS],
    [math.exp(-step / 100) for step in STEPS],
    [0.41 + 0.01 * (step % 3) for step in STEPS],
    [1e9 * step for step in STEPS],
    [math.sin(step / 50) for step in STEPS],
]


def paths(svg: str) -> list[list[tuple[float, float]]]:
    """The points of the curves and areas."""
    found = re.findall(r'<path d="M([^"]*)" (?:stroke|fill)', svg)
    return [[tuple(map(float, point.split())) for point in re.split("[LV]", path) if " " in point] for path in found]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("values", CURVES)
def test_curves_stay_within_the_axes_and_lie_between_the_labels_that_they_are_between(values: list[float], log: bool):
    svg = chart("title", [Line(STEPS, values)], log=log, level=values[50], marks=[500])
    [points] = paths(svg)
    assert all(LEFT <= x <= RIGHT and TOP <= y <= BOTTOM for x, y in points)
    labels = re.findall(r'class="grid" d="M\d+ ([0-9.]+)H\d+"/><text class="end"[^>]*>([^<]+)<', svg)
    assert len(labels) >= 2
    for y, label in labels:
        for (_, at), value in zip(points, values, strict=True):
            # Labels and coordinates are rounded.
            assert at <= float(y) + 0.2 or value <= float(label) + 1e-5 * abs(value)
            assert at >= float(y) - 0.2 or value >= float(label) - 1e-5 * abs(value)


def test_decades_are_equally_high_on_a_logarithmic_axis_alone():
    for log in (True, False):
        [points] = paths(chart("t", [Line([1, 2, 3], [1, 10, 100])], log=log))
        heights = [y for _, y in points]
        assert math.isclose(heights[0] - heights[1], heights[1] - heights[2], abs_tol=0.2) == log


def test_nothing_one_point_and_what_is_no_number_have_charts():
    assert paths(chart("t", [])) == []
    assert "circle" in chart("t", [Line([7], [3.0])])
    svg = chart("t", [Line([1, 2, 3, 4, 5], [1.0, math.nan, 2.0, math.inf, 3.0])])
    assert "nan" not in svg
    assert len(paths(svg)[0]) == 3


def test_of_a_long_record_the_peaks_stay():
    values = [1.0] * 100_000
    values[54_321], values[77_777] = 9.0, 0.5
    [points] = paths(chart("t", [Line(range(100_000), values)]))
    assert len(points) <= POINTS
    assert min(y for _, y in points) == TOP
    assert len([y for _, y in points if y > points[0][1]]) == 1


def test_areas_are_stacked_in_the_order_of_their_legend():
    svg = chart("t", [Line([0, 1], [20, 30], "low"), Line([0, 1], [80, 70], "high")], stacked=True, top=100)
    # The higher is drawn first, and the lower over it.
    high, low = paths(svg)
    assert min(y for _, y in high) == TOP < min(y for _, y in low)
    assert svg.index("low") < svg.index("high")


def test_legends_stand_below_the_drawing_and_words_are_escaped():
    svg = chart("<b>", [Line([0, 1], [0, 1], "<script>")], names=["<em>", "x"])
    assert svg.index("</svg>") < svg.index("&lt;script&gt;")
    assert not {"b", "em", "script"} & Page(svg).tags.keys()
