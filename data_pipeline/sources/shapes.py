"""The miniature world as a source: endless exact samples of every task, of the training split."""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from PIL import Image

from data_pipeline.records import RawRecord, SourcePartition
from wemmu.config import Task, prepare
from wemmu.shapes.edits import Edit, random_edit, random_two_image_edit
from wemmu.shapes.language import DESCRIBE, brief_caption, caption, full_caption, question, wordings
from wemmu.shapes.render import render
from wemmu.shapes.scene import Scene, random_scene

# Share of descriptions among understanding records; the rest are questions.
DESCRIPTIONS = 0.5


class SceneRecord(NamedTuple):
    """Prompt, input scenes, target scene (None: the first input) and, for understanding and captions, the answer."""

    prompt: str
    inputs: tuple[Scene, ...] = ()
    target: Scene | None = None
    answer: str = ""


def _t2i(rng: random.Random) -> SceneRecord:
    scene = random_scene(rng)
    return SceneRecord(caption(scene, rng), target=scene)


def _reconstruction(rng: random.Random) -> SceneRecord:
    return SceneRecord("", (random_scene(rng),))


def _unconditional(rng: random.Random) -> SceneRecord:
    return SceneRecord("", target=random_scene(rng))


def _edited(edit: Edit) -> SceneRecord:
    return SceneRecord(edit.instruction, edit.sources, edit.target)


def _understanding(rng: random.Random) -> SceneRecord:
    scene = random_scene(rng)
    asked = (DESCRIBE, full_caption(scene)) if rng.random() < DESCRIPTIONS else question(scene, rng)
    return SceneRecord(asked[0], (scene,), answer=asked[1])


def _caption(rng: random.Random) -> SceneRecord:
    """With a caption that leaves out much: what is there to be gained by a policy that learns from rewards."""
    scene = random_scene(rng)
    return SceneRecord("", (scene,), answer=brief_caption(scene, rng))


RECORDS: dict[Task, Callable[[random.Random], SceneRecord]] = {
    Task.T2I: _t2i,
    Task.RECONSTRUCTION: _reconstruction,
    Task.UNCONDITIONAL: _unconditional,
    Task.EDIT: lambda rng: _edited(random_edit(rng)),
    Task.MULTI_EDIT: lambda rng: _edited(random_two_image_edit(rng)),
    Task.UNDERSTANDING: _understanding,
    Task.CAPTION: _caption,
}


Name = TypeVar("Name", bound=str)


def _drawn(shares: Mapping[Name, float], rng: random.Random) -> Name:
    return rng.choices(tuple(shares), tuple(shares.values()))[0]


@dataclass(frozen=True)
class SceneDrawing:
    """A scene as a Drawing."""

    scene: Scene
    size: tuple[int, int] | None = None

    def draw(self, height: int, width: int) -> Image.Image:
        return render(self.scene, (height, width))


class ShapesSource:
    """Scenes depend on (seed, task, number) only, not on the names of source and parts."""

    # tests/data/test_shapes_source.py fails when the records change under an old version.
    version = 1

    def __init__(self, config: prepare.ShapesSource):
        self._config = config
        self._samples = dict(RECORDS)
        if config.edits:
            self._samples[Task.EDIT] = self._weighted_edit
        if config.captions:
            self._samples[Task.T2I] = self._weighted_caption

    def _weighted_edit(self, rng: random.Random) -> SceneRecord:
        return _edited(random_edit(rng, kind=_drawn(self._config.edits, rng)))

    def _weighted_caption(self, rng: random.Random) -> SceneRecord:
        wording = _drawn(self._config.captions, rng)
        scene = random_scene(rng)
        while wording not in wordings(scene):
            scene = random_scene(rng)
        return SceneRecord(caption(scene, rng, wording), target=scene)

    def files(self) -> list[tuple[str, int]]:
        return []

    def parts(self, size: int) -> list[SourcePartition]:
        return [
            self._part(task, first, min(first + size, samples))
            for task, samples in self._config.samples.items()
            for first in range(0, samples, size)
        ]

    def _part(self, task: Task, first: int, end: int) -> SourcePartition:
        place = {"task": str(task), "first": first, "end": end, "seed": self._config.seed}
        return SourcePartition(self._config.name, f"{task}/{first}-{end - 1}", place)

    def read(self, part: SourcePartition) -> Iterator[RawRecord]:
        task, seed = Task(part.place["task"]), part.place["seed"]
        for number in range(part.place["first"], part.place["end"]):
            sample = self._samples[task](random.Random(f"shapes/{seed}/{task}/{number}"))
            # Drawn apart, so that the scenes do not depend on the sizes.
            drawn = random.Random(f"shapes/{seed}/{task}/{number}/sizes")
            sizes = drawn.choices(self._config.sizes or (None,), k=max(1, len(sample.inputs)))
            yield RawRecord(
                key=f"{task}/{number}",
                task=task,
                prompt=sample.prompt,
                images=tuple(map(SceneDrawing, sample.inputs, sizes)),
                target=None if sample.target is None else SceneDrawing(sample.target, sizes[0]),
                answer=sample.answer,
            )
