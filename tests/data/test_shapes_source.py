"""The records of the shapes source: pure, of the training split, true to what they ask for."""

import hashlib

import numpy as np
import pytest
from PIL import Image

from data_pipeline.records import Record
from data_pipeline.sources.shapes import SAMPLES, Shapes
from wemmu.config.task import GENERATION_TASKS, Task
from wemmu.shapes.scene import Scene
from wemmu.shapes.scorer import caption_satisfied, read

INPUTS = {Task.T2I: 0, Task.RECONSTRUCTION: 1, Task.UNCONDITIONAL: 0, Task.EDIT: 1, Task.MULTI_EDIT: 2}


def record(task: Task, number: int, seed: int = 0, px: int = 64) -> Record:
    return Shapes().record(task, seed, number, (px, px))


def scenes(made: Record) -> list[Scene | None]:
    pictures: list[Image.Image] = [*made.images, *([made.target] if made.target else [])]
    return [read(picture).scene for picture in pictures]


@pytest.mark.parametrize("task", GENERATION_TASKS)
def test_a_record_depends_on_nothing_but_its_name(task: Task) -> None:
    forward = [record(task, n).columns() for n in range(8)]
    assert [record(task, n).columns() for n in reversed(range(8))] == forward[::-1]
    assert len({str(scenes(record(task, n))) for n in range(8)}) == 8
    assert scenes(record(task, 0, seed=1)) != scenes(record(task, 0))


@pytest.mark.parametrize("task", GENERATION_TASKS)
def test_a_resolution_is_only_another_rendering(task: Task) -> None:
    for number in range(8):
        small, large = record(task, number, px=32), record(task, number, px=64)
        assert (small.id, small.prompt, scenes(small)) == (large.id, large.prompt, scenes(large))
        assert all(image.size == (32, 32) for image in small.images)


@pytest.mark.parametrize("task", GENERATION_TASKS)
def test_every_picture_shows_a_training_scene(task: Task) -> None:
    # One scene in ten is a test scene, so that a source without a split would pass with probability 0.9 ** 60.
    for number in range(60):
        for scene in scenes(record(task, number)):
            assert scene is not None
            assert scene.split == "train"


@pytest.mark.parametrize("task", GENERATION_TASKS)
def test_a_record_has_what_its_task_needs(task: Task) -> None:
    made = record(task, 0)
    assert len(made.images) == INPUTS[task]
    assert (made.target is None) == (task is Task.RECONSTRUCTION)
    assert (made.prompt == "") == (task in (Task.RECONSTRUCTION, Task.UNCONDITIONAL))


def test_captions_are_true_of_their_pictures() -> None:
    for number in range(40):
        made = record(Task.T2I, number)
        assert caption_satisfied(made.target, made.prompt), (made.id, made.prompt)


def test_edits_change_the_picture() -> None:
    for task in (Task.EDIT, Task.MULTI_EDIT):
        for number in range(20):
            first, *_, target = scenes(record(task, number))
            assert first != target


@pytest.mark.parametrize("task", GENERATION_TASKS)
def test_storing_loses_nothing(task: Task) -> None:
    made = record(task, 3)
    stored = Record.from_columns(made.columns())
    assert (stored.id, stored.task, stored.prompt) == (made.id, made.task, made.prompt)
    assert len(stored.images) == len(made.images)
    assert (stored.target is None) == (made.target is None)
    pairs = [*zip(stored.images, made.images, strict=True), *([(stored.target, made.target)] if made.target else [])]
    assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in pairs)


def test_other_records_need_another_version() -> None:
    """Shards are reused by version. When this fails, raise `Shapes.version` and put the new pair here."""
    said = [(made.id, made.prompt, scenes(made)) for task in SAMPLES for made in (record(task, n) for n in range(20))]
    digest = hashlib.sha256(repr(said).encode()).hexdigest()[:16]
    assert (Shapes.version, digest) == (1, "2b81a5d22cbbe7c9")
