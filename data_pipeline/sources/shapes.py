"""The miniature world as a source: endless exact samples of every generation task, of the training split."""

import random
from collections.abc import Callable

from data_pipeline.records import Record
from wemmu.config.task import Task
from wemmu.shapes.edits import Edit, random_edit, random_two_image_edit
from wemmu.shapes.language import caption
from wemmu.shapes.render import render
from wemmu.shapes.scene import Scene, random_scene

# Prompt, input scenes, target scene; a target of None is the first input.
Sample = tuple[str, tuple[Scene, ...], Scene | None]


def _t2i(rng: random.Random) -> Sample:
    scene = random_scene(rng)
    return caption(scene, rng), (), scene


def _reconstruction(rng: random.Random) -> Sample:
    return "", (random_scene(rng),), None


def _unconditional(rng: random.Random) -> Sample:
    return "", (), random_scene(rng)


def _edited(edit: Edit) -> Sample:
    return edit.instruction, edit.sources, edit.target


SAMPLES: dict[Task, Callable[[random.Random], Sample]] = {
    Task.T2I: _t2i,
    Task.RECONSTRUCTION: _reconstruction,
    Task.UNCONDITIONAL: _unconditional,
    Task.EDIT: lambda rng: _edited(random_edit(rng)),
    Task.MULTI_EDIT: lambda rng: _edited(random_two_image_edit(rng)),
}


class Shapes:
    """Scenes are drawn from (seed, task, number) alone; a resolution is only how they are rendered."""

    # tests/data/test_source.py fails when the records change under an old version.
    version = 1

    def sizes(self, resolution: int) -> list[tuple[int, int]]:
        return [(resolution, resolution)]

    def record(self, task: Task, seed: int, number: int, size: tuple[int, int]) -> Record:
        name = f"shapes/{seed}/{task}/{number}"
        prompt, inputs, target = SAMPLES[task](random.Random(name))
        return Record(
            id=name,
            task=task,
            prompt=prompt,
            images=tuple(render(scene, size) for scene in inputs),
            target=None if target is None else render(target, size),
        )
