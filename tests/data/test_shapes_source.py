"""The records of the shapes source: pure, of the training split, true to what they ask for."""

import hashlib
from typing import get_args

import pytest
from pydantic import ValidationError

from data_pipeline.chain import Decoded, usable_buckets
from data_pipeline.records import RawRecord
from data_pipeline.sources import open_source
from data_pipeline.sources.shapes import RECORDS, SceneDrawing
from wemmu.config import Task, prepare
from wemmu.shapes.edits import EDITS
from wemmu.shapes.language import DESCRIBE, WORDINGS, parse_caption
from wemmu.shapes.scene import Scene
from wemmu.shapes.scorer import caption_satisfied, read

INPUTS = {
    Task.T2I: 0,
    Task.RECONSTRUCTION: 1,
    Task.UNCONDITIONAL: 0,
    Task.EDIT: 1,
    Task.MULTI_EDIT: 2,
    Task.UNDERSTANDING: 1,
    Task.CAPTION: 1,
}


def config(samples: dict[Task, int], seed: int = 0, name: str = "shapes", **more: object) -> prepare.ShapesSource:
    return prepare.ShapesSource(kind="shapes", name=name, samples=samples, seed=seed, **more)


def records(task: Task, count: int, seed: int = 0, size: int = 1000) -> list[RawRecord]:
    source = open_source(config({task: count}, seed))
    return [record for part in source.parts(size) for record in source.read(part)]


def drawings(record: RawRecord) -> list[SceneDrawing]:
    return [*record.images, *([record.target] if record.target else [])]


def scenes(record: RawRecord, px: int = 64) -> list[Scene | None]:
    """What the images show, not what they were told to."""
    return [read(drawing.draw(px, px)).scene for drawing in drawings(record)]


@pytest.mark.parametrize("task", list(Task))
def test_a_record_depends_on_nothing_but_seed_task_and_number(task: Task) -> None:
    made = records(task, 8)
    for size in (1, 3, 8):
        assert records(task, 8, size=size) == made
    assert records(task, 20)[:8] == made
    assert [record.key for record in made] == [f"{task}/{number}" for number in range(8)]
    assert len({str(drawings(record)) for record in made}) == 8
    assert drawings(records(task, 1, seed=1)[0]) != drawings(made[0])


def test_parts_are_ranges_of_one_task_and_know_the_seed() -> None:
    samples = {Task.T2I: 5, Task.EDIT: 4}
    parts = open_source(config(samples)).parts(2)
    assert [part.name for part in parts] == ["t2i/0-1", "t2i/2-3", "t2i/4-4", "edit/0-1", "edit/2-3"]
    assert {part.source for part in open_source(config(samples, name="mini")).parts(2)} == {"mini"}
    assert not any(part in parts for part in open_source(config(samples, seed=1)).parts(2))


@pytest.mark.parametrize(
    ("samples", "more", "message"),
    [
        ({Task.T2I: 1}, {"captions": {"sung": 1}}, "'placed', 'unplaced' or 'related'"),
        ({Task.EDIT: 1}, {"edits": {"explode": 1}}, "'recolor', 'reshape'"),
    ],
)
def test_what_the_world_cannot_make_is_refused_when_the_config_is_read(
    samples: dict[Task, int], more: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        config(samples, **more)


def test_all_that_the_world_can_make_can_be_asked_for() -> None:
    assert get_args(prepare.EditKind) == tuple(EDITS)
    assert get_args(prepare.Wording) == WORDINGS
    assert set(Task) == set(RECORDS)


def test_captions_come_in_the_shares_that_are_asked_for() -> None:
    shares = {"related": 3, "unplaced": 1}
    source = open_source(config({Task.T2I: 400}, captions=shares))
    demands = [parse_caption(record.prompt) for part in source.parts(100) for record in source.read(part)]
    related = sum(demand.relation is not None for demand in demands)
    # Three deviations of a binomial of 400 and 3/4.
    assert abs(related - 300) < 26
    assert not any(mention.cell is not None for demand in demands for mention in demand.mentions)


def test_edits_come_in_the_shares_that_are_asked_for() -> None:
    source = open_source(config({Task.EDIT: 60}, edits={"remove": 3, "add": 1}))
    change = [
        len(after.objects) - len(before.objects)
        for part in source.parts(1000)
        for before, after in map(scenes, source.read(part))
    ]
    assert set(change) == {-1, 1}
    assert 36 <= change.count(-1) <= 54, "45 of 60 are expected, with a deviation of 3.4"


@pytest.mark.parametrize("task", list(Task))
def test_a_size_is_only_another_rendering(task: Task) -> None:
    for record in records(task, 8):
        assert scenes(record, px=32) == scenes(record, px=64)
        assert [drawing.draw(32, 64).size for drawing in drawings(record)] == [(64, 32)] * len(drawings(record))


@pytest.mark.parametrize("task", list(Task))
def test_every_image_shows_a_training_scene(task: Task) -> None:
    # One scene in ten is a test scene, so that a source without a split would pass with probability 0.9 ** 60.
    for record in records(task, 60):
        for scene in scenes(record):
            assert scene is not None
            assert scene.split == "train"


@pytest.mark.parametrize("task", list(Task))
def test_a_record_has_what_its_task_needs(task: Task) -> None:
    (made,) = records(task, 1)
    assert made.task is task
    assert len(made.images) == INPUTS[task]
    assert (made.target is None) == (task in (Task.RECONSTRUCTION, Task.UNDERSTANDING, Task.CAPTION))
    assert bool(made.answer) == (task in (Task.UNDERSTANDING, Task.CAPTION))
    assert (made.prompt == "") == (task in (Task.RECONSTRUCTION, Task.UNCONDITIONAL, Task.CAPTION))


def test_captions_and_descriptions_are_true_of_their_images() -> None:
    for made in records(Task.T2I, 40):
        assert caption_satisfied(made.target.draw(64, 64), made.prompt), (made.key, made.prompt)
    made = [record for record in records(Task.UNDERSTANDING, 40) if record.prompt == DESCRIBE]
    assert 10 < len(made) < 30
    for record in made:
        assert caption_satisfied(record.images[0].draw(64, 64), record.answer), (record.key, record.answer)


def test_brief_captions_are_true_and_leave_out_about_half() -> None:
    said = []
    for made in records(Task.CAPTION, 60):
        (scene,) = scenes(made)
        demand = parse_caption(made.answer)
        assert demand.satisfied_by(scene), (scene, made.answer)
        said += [word is not None for m in demand.mentions for word in (m.color, m.size, m.cell)]
    assert 0.4 < sum(said) / len(said) < 0.6


def test_edits_change_the_image() -> None:
    for task in (Task.EDIT, Task.MULTI_EDIT):
        for record in records(task, 20):
            first, *_, target = scenes(record)
            assert first != target


@pytest.mark.parametrize(
    ("tasks", "known"),
    [([task for task in Task if task is not Task.CAPTION], "b6dd45ab515afc78"), ([Task.CAPTION], "a0e1a13435cc4661")],
    ids=["older tasks", "caption"],
)
def test_other_records_need_another_version(tasks: list[Task], known: str) -> None:
    """Shards are reused by version. When this fails, raise `ShapesSource.version` and put the new pair here."""
    source = open_source(config(dict.fromkeys(tasks, 20)))
    made = [record for part in source.parts(1000) for record in source.read(part)]
    said = [(f"shapes/0/{record.key}", record.prompt, record.answer, scenes(record)) for record in made]
    digest = hashlib.sha256(repr(said).encode()).hexdigest()[:16]
    assert (source.version, digest) == (1, known)


def test_records_of_several_sizes_show_the_same_scenes_and_an_edit_follows_its_first_input() -> None:
    sizes = ((48, 80), (64, 64), (80, 48))
    source = open_source(config({Task.MULTI_EDIT: 20}, sizes=sizes))
    made = [record for part in source.parts(1000) for record in source.read(part)]
    plain = records(Task.MULTI_EDIT, 20)
    assert [[d.scene for d in drawings(r)] for r in made] == [[d.scene for d in drawings(r)] for r in plain]
    assert {d.size for record in made for d in drawings(record)} == set(sizes)
    assert {d.size for record in plain for d in drawings(record)} == {None}
    assert all(first.size == target.size for first, _, target in map(drawings, made))
    assert any(first.size != second.size for first, second, _ in map(drawings, made))
    # The writer puts such a record into the stream of its sizes.
    choices = {64: sizes}
    for record in made:
        first, second, target = drawings(record)
        decoded = Decoded(record, record.images, record.target)
        assert list(usable_buckets(decoded, [64], choices, 1.0)) == [(64, target.size, [first.size, second.size])]
