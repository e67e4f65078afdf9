"""A stage that rises from 32 to 64 px, and a process that trains one of the two and is killed at a moment of its own.

`python -m tests.training.rising CONFIG MOMENT`.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.data.handmade import Record, shapes, stream, write
from tests.training.runs import STAGE, make_run
from wemmu.checkpoint import store
from wemmu.config import Curriculum, StageRun, dump, load_stage
from wemmu.config.schema import Backbones
from wemmu.config.shards import StreamSettings
from wemmu.config.task import Task
from wemmu.training.resolutions import ResolutionSchedule
from wemmu.training.trainer import Trainer

# No loss halves in two steps, so the first resolution ends at the second validation, with step 4 of 6.
PLATEAU = {"samples": 24, "plateau": {"every": 2, "window": 1, "min_gain": 0.5, "patience": 1}}
STEPS, BOUNDARY = 10, 4
# Moments in the order in which a run that is killed at each of them, and begun again, comes by: its resolution.
MOMENTS = {
    "validated": 32,
    "saving": 32,
    "saved": 32,
    "closed": 32,
    "risen": 64,
    "resumed": 64,
}


def write_shards(root: Path) -> None:
    """Text to image and editing at 32 and at 64 px, of the same scenes."""
    streams: dict[StreamSettings, list[Record]] = {}
    for px in (32, 64):
        for task in (Task.T2I, Task.EDIT):
            settings = stream(task, px, px).model_copy(update={"resolution": px})
            records = shapes(task, 16, (px, px))
            # An image bears one id whatever the resolution.
            streams[settings] = [Record(f"{task}/{i}", *_rest(r)) for i, r in enumerate(records)]
    write(root, streams)


def _rest(record: Record) -> tuple[Any, ...]:
    return record.prompt, record.images, record.target


def curriculum_of(backbones: Backbones, shards: Path, rule: dict[str, Any] = PLATEAU, **changes: object) -> Curriculum:
    run = make_run(
        backbones,
        shards,
        data={"shards": shards, "validation": 3},
        logging={"every": 1, "checkpoint_every": 3, "samples_every": 99, "keep_checkpoints": 2, "wandb": "disabled"},
        **changes,
    )
    shared = {field: getattr(run, field) for field in Curriculum.model_fields if field in StageRun.model_fields}
    stage = {**STAGE, "steps": STEPS, "resolution": [32, 64], "next_resolution": rule}
    return Curriculum.model_validate({**shared, "stages": [stage]})


def prepare(folder: Path, curriculum: Curriculum) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for run in curriculum.resolution_runs("stage"):
        dump(run, config(folder, run.stage.resolution))
    return folder


def config(folder: Path, resolution: int) -> Path:
    return folder / f"config-{resolution}.yaml"


def train(folder: Path, resolution: int) -> int:
    return Trainer(load_stage(config(folder, resolution)), folder).train()


def _die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _when(test: Callable[..., bool], owner: Any, name: str, after: bool = False) -> None:
    """Die as soon as `owner.name` is called with what `test` accepts; `after` it has done its work."""
    real = getattr(owner, name)

    def killed(*arguments: Any) -> Any:
        now = test(*arguments)
        if now and not after:
            _die()
        result = real(*arguments)
        if now:
            _die()
        return result

    setattr(owner, name, killed)


def die_at(moment: str) -> None:
    match moment:
        case "validated":
            # Step 4's validation loss is written, its checkpoint is not.
            count: list[float] = []
            _when(lambda _, loss: count.append(loss) or len(count) == 2, ResolutionSchedule, "note")
        case "saving":
            _when(lambda root, tensors, step, *_: step == BOUNDARY, store, "write")
        case "saved":
            _when(lambda *_: True, ResolutionSchedule, "close")
        case "closed":
            _when(lambda *_: True, ResolutionSchedule, "close", after=True)
        case "risen":
            # In the second resolution before its first checkpoint.
            _when(lambda _, batches, window: True, Trainer, "_optimize", after=True)
        case "resumed":
            _when(lambda trainer, *_: trainer.step == 7, Trainer, "_optimize")


if __name__ == "__main__":
    die_at(sys.argv[2])
    file = Path(sys.argv[1])
    sys.exit(Trainer(load_stage(file), file.parent).train())
