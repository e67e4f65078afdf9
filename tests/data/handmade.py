"""Data sets of layout 2 written directly, record by record, so that tests of the reader need no writer."""

import hashlib
import io
import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import skimage.data
from PIL import Image
from streaming import MDSWriter

from wemmu.config import Curriculum
from wemmu.config.shards import (
    COLUMNS,
    DATASET_FILE,
    INDEX_FILE,
    LEDGER,
    DataSet,
    Stream,
    StreamSettings,
    checksum,
    pack,
)
from wemmu.config.task import Task
from wemmu.shapes.edits import random_edit, random_two_image_edit
from wemmu.shapes.language import DESCRIBE, caption
from wemmu.shapes.render import render
from wemmu.shapes.scene import random_scene

PX = 32
INPUTS = {Task.T2I: 0, Task.RECONSTRUCTION: 1, Task.UNCONDITIONAL: 0, Task.EDIT: 1, Task.MULTI_EDIT: 2}
INPUTS[Task.UNDERSTANDING] = 1
# All five tasks, with numbers of records that are multiples neither of the partition nor of the global batch.
SAMPLES = {Task.T2I: 30, Task.RECONSTRUCTION: 17, Task.UNCONDITIONAL: 9, Task.EDIT: 26, Task.MULTI_EDIT: 13}
MIXTURE = {"t2i": 0.3, "reconstruction": 0.15, "unconditional": 0.05, "edit": 0.3, "multi_edit": 0.2}
PARTITION = 7


@dataclass(frozen=True)
class Record:
    """Images of one size. `target` None: the first input is it. `latents` as bytes, of the target and each input."""

    id: str
    prompt: str = ""
    images: tuple[Image.Image, ...] = ()
    target: Image.Image | None = None
    latents: tuple[bytes, ...] = ()
    answer: str = ""


def stream(task: Task, height: int = PX, width: int = PX, inputs: int | None = None, **changes: Any) -> StreamSettings:
    inputs = INPUTS[task] if inputs is None else inputs
    return StreamSettings(task=task, resolution=PX, height=height, width=width, inputs=inputs, **changes)


def shapes(task: Task, count: int, size: tuple[int, int] = (PX, PX)) -> list[Record]:
    """Images of `size` = (height, width) from the miniature world."""
    records = []
    for number in range(count):
        name = f"shapes/{size}/{task}/{number}"
        rng = random.Random(name)
        scene = random_scene(rng)
        match task:
            case Task.T2I:
                record = Record(name, caption(scene, rng), (), render(scene, size))
            case Task.RECONSTRUCTION:
                record = Record(name, "", (render(scene, size),))
            case Task.UNDERSTANDING:
                record = Record(name, DESCRIBE, (render(scene, size),), answer=caption(scene, rng))
            case Task.UNCONDITIONAL:
                record = Record(name, "", (), render(scene, size))
            case _:
                edit = random_edit(rng) if task is Task.EDIT else random_two_image_edit(rng)
                inputs = tuple(render(source, size) for source in edit.sources)
                record = Record(name, edit.instruction, inputs, render(edit.target, size))
        records.append(record)
    return records


@cache
def _photographs() -> list[tuple[str, Image.Image]]:
    found = {
        "an astronaut": skimage.data.astronaut,
        "a cup of coffee": skimage.data.coffee,
        "a cat": skimage.data.chelsea,
    }
    return [(name, Image.fromarray(load())) for name, load in found.items()]


def photographs(count: int, size: tuple[int, int] = (PX, PX)) -> list[Record]:
    """Text-to-image records of pieces of the photographs that come with scikit-image, all different."""
    records, (height, width) = [], size
    for number in range(count):
        name, photograph = _photographs()[number % len(_photographs())]
        rng = random.Random(number)
        x, y = (rng.randrange(side - 200) for side in photograph.size)
        piece = photograph.crop((x, y, x + 200, y + 200)).resize((width, height))
        records.append(Record(f"photographs/{size}/{number}", name, (), piece))
    return records


def columns(task: Task, record: Record, form: Literal["PNG", "JPEG"] = "PNG") -> dict[str, Any]:
    """The record as `wemmu.config.shards.COLUMNS` stores it."""
    found = {
        "id": record.id,
        "task": task.value,
        "prompt": record.prompt,
        "answer": record.answer,
        "images": pack([file_of(image, form) for image in record.images]),
        "target": b"" if record.target is None else file_of(record.target, form),
        "latents": pack(record.latents) if record.latents else b"",
    }
    return {**found, "checksum": checksum(found)}


def file_of(image: Image.Image, form: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **({"quality": 95, "subsampling": 0} if form == "JPEG" else {}))
    return buffer.getvalue()


def write(
    root: Path,
    streams: Mapping[StreamSettings, Sequence[Record]],
    form: Literal["PNG", "JPEG"] = "PNG",
    partition: int = PARTITION,
) -> DataSet:
    """A complete data set in `root`, each partition of `partition` records one shard."""
    rows = {settings: [columns(settings.task, r, form) for r in records] for settings, records in streams.items()}
    return write_columns(root, rows, partition)


def write_columns(
    root: Path, streams: Mapping[StreamSettings, Sequence[dict[str, Any]]], partition: int = PARTITION
) -> DataSet:
    """As `write`, from stored columns, which need not be right."""
    dataset = DataSet(streams=tuple(_write_stream(root, *stream, partition) for stream in streams.items()))
    (root / LEDGER).mkdir(exist_ok=True)
    dataset.save(root / DATASET_FILE)
    return dataset


def _write_stream(root: Path, settings: StreamSettings, rows: Sequence[dict[str, Any]], partition: int) -> Stream:
    home = root / settings.name
    shards, files = [], {}
    for number, start in enumerate(range(0, len(rows), partition)):
        with MDSWriter(columns=COLUMNS, out=str(home / f"{number:05d}"), hashes=["sha256"]) as writer:
            for row in rows[start : start + partition]:
                writer.write(row)
        for shard in writer.shards:
            raw = shard["raw_data"]
            name = f"{number:05d}/{raw['basename']}"
            shards.append({**shard, "raw_data": {**raw, "basename": name}})
            files[name] = raw["hashes"]["sha256"]
        (home / f"{number:05d}" / INDEX_FILE).unlink()
    index = json.dumps({"version": 2, "shards": shards}).encode()
    (home / INDEX_FILE).write_bytes(index)
    files[INDEX_FILE] = hashlib.sha256(index).hexdigest()
    size = sum(shard["raw_data"]["bytes"] for shard in shards)
    return Stream(settings=settings, samples=len(rows), bytes=size, files=files)


def all_tasks(samples: Mapping[Task, int] = SAMPLES) -> dict[StreamSettings, list[Record]]:
    return {stream(task): shapes(task, count) for task, count in samples.items()}


def make_curriculum(shards: Path, **changes: Any) -> Curriculum:
    """A one-stage curriculum over `shards`; `changes` are fields of the stage, of `data` or of `memory`."""
    stage = {
        "name": "only",
        "resolution": PX,
        "steps": 60,
        "global_batch": 8,
        "trains": ["pathway"],
        "objective": {"kind": "flow"},
        "optimizer": {"lr": 1e-3},
        "mixture": MIXTURE,
    }
    data = {"shards": shards, "workers": 0, "damaged": "stop", "remote": None, "cache_gb": None}
    memory = {"micro_batch": 2, "reference_resolution": PX}
    for field, value in changes.items():
        owner = next((d for d in (stage, data, memory) if field in d), None)
        assert owner is not None, field
        owner[field] = value
    backbones = {"vlm": "nowhere", "sana": "nowhere"}
    return Curriculum.model_validate(
        {"name": "tiny", "seed": 3, "backbones": backbones, "data": data, "memory": memory, "stages": [stage]}
    )


def pixels(image: Image.Image) -> np.ndarray:
    """uint8 [3, H, W]."""
    return np.array(image.convert("RGB")).transpose(2, 0, 1)


def shard_files(root: Path) -> list[Path]:
    return sorted(root.rglob("*.mds"))


def rewrite(path: Path, change: Callable[[bytearray], Iterable[int] | None]) -> None:
    """Change the bytes of a file in place."""
    content = bytearray(path.read_bytes())
    change(content)
    path.write_bytes(content)
