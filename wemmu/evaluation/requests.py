"""Held-out requests for evaluation, the same for every stage and every run.

A request is a function of (seed, task, split, number) alone, and a split is a property of a scene's content
(`Scene.split`). So training never uses a request, and two stages can be compared request by request.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from wemmu.config.task import Task
from wemmu.shapes.edits import EDITS, Edit, random_edit, random_two_image_edit
from wemmu.shapes.language import DESCRIBE, caption, full_caption, question
from wemmu.shapes.scene import MAX_OBJECTS, Scene, Split, random_scene

# Edits that can create a colour-shape pair that no training scene has.
COMPOSING_EDITS = ("recolor", "reshape", "add")


@dataclass(frozen=True)
class HeldOutRequest:
    """One held-out request.

    sample_id: key of its noise. sources: the input images as scenes. target: a correct answer (the only one, unless a
    caption leaves something open), None if anything is correct. group: key for breakdowns: number of objects, kind of
    edit or question. answer: the correct text, for understanding.
    """

    task: Task
    split: Split
    number: int
    sample_id: int
    text: str
    sources: tuple[Scene, ...]
    target: Scene | None
    group: str
    edit: Edit | None = None
    answer: str = ""


def splits(task: Task) -> tuple[Split, ...]:
    """Return the splits on which a task is scored; unconditional generation has no held-out pairs."""
    return ("test",) if task is Task.UNCONDITIONAL else ("test", "composition")


def held_out(task: Task, split: Split, seed: int) -> Iterator[HeldOutRequest]:
    """Yield the requests of a task and split without end; n requests are the first n of any longer list."""
    number = 0
    while True:
        rng = random.Random(f"evaluation/{seed}/{task}/{split}/{number}")
        yield _ask(task, split, number, rng)
        number += 1


def _ask(task: Task, split: Split, number: int, rng: random.Random) -> HeldOutRequest:
    sample_id = rng.getrandbits(62)
    match task:
        case Task.T2I | Task.RECONSTRUCTION:
            # Groups in turn, not at random: equal numbers of each, and the first few show all of them.
            scene = random_scene(rng, split, objects=1 + number % MAX_OBJECTS)
            text, sources = (caption(scene, rng), ()) if task is Task.T2I else ("", (scene,))
            return HeldOutRequest(task, split, number, sample_id, text, sources, scene, _objects(scene))
        case Task.UNCONDITIONAL:
            return HeldOutRequest(task, split, number, sample_id, "", (), None, "any")
        case Task.CAPTION:
            scene = random_scene(rng, split, objects=1 + number % MAX_OBJECTS)
            return HeldOutRequest(
                task, split, number, sample_id, "", (scene,), scene, _objects(scene), answer=full_caption(scene)
            )
        case Task.EDIT:
            kinds: Sequence[str] = COMPOSING_EDITS if split == "composition" else tuple(EDITS)
            edit = random_edit(rng, split, kinds[number % len(kinds)])
        case Task.MULTI_EDIT:
            edit = random_two_image_edit(rng, split)
        case Task.UNDERSTANDING:
            scene = random_scene(rng, split, objects=1 + number // 2 % MAX_OBJECTS)
            group = ("description", "question")[number % 2]
            text, answer = (DESCRIBE, full_caption(scene)) if group == "description" else question(scene, rng)
            return HeldOutRequest(task, split, number, sample_id, text, (scene,), scene, group, answer=answer)
    return HeldOutRequest(task, split, number, sample_id, edit.instruction, edit.sources, edit.target, edit.kind, edit)


def _objects(scene: Scene) -> str:
    count = len(scene.objects)
    return f"{count} object{'s' if count > 1 else ''}"
