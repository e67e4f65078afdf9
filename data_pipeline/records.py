"""One record of a stream, and its form in a shard."""

import io
from dataclasses import dataclass
from typing import Any

from PIL import Image

from wemmu.config.shards import pack, unpack
from wemmu.config.task import Task

# Lossless at any level. Level 1 brings a rendered picture to a twentieth; 6 saves a tenth more in half again the time.
PNG_LEVEL = 1


@dataclass(frozen=True)
class Record:
    """What a sample gives the model and what it must make of it.

    `id` is unique among all records of its source and the same at every resolution. `images` are the input pictures.
    `target` None means that the first of them is the target, which is then stored once.
    """

    id: str
    task: Task
    prompt: str
    images: tuple[Image.Image, ...]
    target: Image.Image | None

    def columns(self) -> dict[str, Any]:
        """The record as `wemmu.config.shards.COLUMNS` stores it."""
        return {
            "id": self.id,
            "task": self.task.value,
            "prompt": self.prompt,
            "images": pack([_png(image) for image in self.images]),
            "target": b"" if self.target is None else _png(self.target),
        }

    @classmethod
    def from_columns(cls, columns: dict[str, Any]) -> "Record":
        """The inverse of `columns`."""
        return cls(
            id=columns["id"],
            task=Task(columns["task"]),
            prompt=columns["prompt"],
            images=tuple(Image.open(io.BytesIO(data)) for data in unpack(columns["images"])),
            target=Image.open(io.BytesIO(columns["target"])) if columns["target"] else None,
        )


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG", compress_level=PNG_LEVEL)
    return buffer.getvalue()
