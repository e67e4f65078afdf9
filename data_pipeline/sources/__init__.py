"""Where records come from. A new source is a class with `Source`'s members and a line in `SOURCES`."""

from typing import Protocol

from data_pipeline.records import Record
from data_pipeline.sources.shapes import Shapes
from wemmu.config.task import Task


class Source(Protocol):
    """`version` is raised whenever any record changes, so that shards written before are recognized as others."""

    version: int

    def sizes(self, resolution: int) -> list[tuple[int, int]]:
        """The (height, width) in pixels of the pictures that make up the streams of `resolution`."""
        ...

    def record(self, task: Task, seed: int, number: int, size: tuple[int, int]) -> Record:
        """Record `number` of `task`, a pure function of the arguments; `size` changes nothing but the pixels."""
        ...


SOURCES: dict[str, Source] = {"shapes": Shapes()}
