"""The sources of records. A new source is a class with `Source`'s members, a config and a line in `SOURCES`."""

from collections.abc import Callable
from typing import Any

from data_pipeline.records import Source
from data_pipeline.sources.captioned import FolderSource, ParquetSource
from data_pipeline.sources.conversations import ConversationsSource
from data_pipeline.sources.edits import EditsSource
from data_pipeline.sources.huggingface import HuggingFaceSource
from data_pipeline.sources.shapes import ShapesSource
from data_pipeline.sources.webdataset import WebDatasetSource
from wemmu.config import prepare

# Kind in the config -> class, built from the config.
SOURCES: dict[str, Callable[[Any], Source]] = {
    "shapes": ShapesSource,
    "webdataset": WebDatasetSource,
    "parquet": ParquetSource,
    "folder": FolderSource,
    "conversations": ConversationsSource,
    "edits": EditsSource,
    "huggingface": HuggingFaceSource,
}


def open_source(config: prepare.Source) -> Source:
    return SOURCES[config.kind](config)
