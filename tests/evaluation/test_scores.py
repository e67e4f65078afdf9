"""Shares and their intervals."""

import pytest

from wemmu.config import Task
from wemmu.evaluation.requests import HeldOutRequest
from wemmu.evaluation.scores import Share, judge, readable, seen, summarize, wilson
from wemmu.shapes.render import render
from wemmu.shapes.scene import BACKGROUNDS, CELLS, Object, Scene


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [
        # By hand, or from published tables, to four digits.
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (0, 1, 0.0, 0.7935),
        (1, 1, 0.2065, 1.0),
    ],
)
def test_interval_has_the_known_values(successes: int, count: int, low: float, high: float):
    assert wilson(successes, count) == pytest.approx((low, high), abs=5e-5)


def test_summary_counts_within_groups():
    asks = [HeldOutRequest(Task.T2I, "test", n, n, "", (), None, group) for n, group in enumerate("aab")]
    summary = summarize(asks, [{"satisfied": True}, {"satisfied": False}, {"satisfied": True}])
    assert (summary["measures"]["satisfied"]["successes"], summary["measures"]["satisfied"]["count"]) == (2, 3)
    assert {group: part["satisfied"]["share"] for group, part in summary["by"].items()} == {"a": 0.5, "b": 1.0}


def test_one_group_needs_no_breakdown():
    ask = HeldOutRequest(Task.UNCONDITIONAL, "test", 0, 0, "", (), None, "any")
    assert summarize([ask], [{"readable": True}])["by"] == {}


@pytest.mark.parametrize(("objects", "is_scene"), [(0, False), (1, True), (3, True), (4, False)])
def test_readable_means_a_scene_of_the_world(objects: int, is_scene: bool):
    scene = Scene("pink", tuple(Object(cell, "circle", "red", "large") for cell in range(len(CELLS)))[:objects])
    assert readable(render(scene, 64)) is is_scene


def test_seen_has_words_for_every_image():
    for background in BACKGROUNDS:
        assert seen(render(Scene(background, ()), 64)) == f"an empty {background} background"
    scene = Scene("gray", (Object(1, "cross", "cyan", "small"),))
    assert seen(render(scene, 32)) == "a small cyan cross at the top right on a gray background"


def test_caption_is_judged_by_its_words_and_not_by_the_scene():
    """A caption that says less than all is satisfied by other scenes than the one it was made from."""
    said, drawn = (Scene("white", (Object(cell, "square", "red", "large"),)) for cell in (0, 3))
    ask = HeldOutRequest(Task.T2I, "test", 0, 0, "a red square on a white background", (), said, "1 object")
    assert judge(ask, render(drawn, 64))["satisfied"]
    assert not judge(ask, render(Scene("black", drawn.objects), 64))["satisfied"]


def test_share_is_made_of_outcomes():
    share = Share.of([True, False, False, False])
    assert (share.count, share.successes, share.share) == (4, 1, 0.25)
    assert (share.low, share.high) == wilson(1, 4)
