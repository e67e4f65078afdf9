"""Base of the sources whose files hold rows: JSONL, a JSON array or Parquet, detected from the content."""

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Generic, TypeVar

from data_pipeline.records import RawRecord, Reason, Rejection, SourcePartition
from data_pipeline.sources import parquet
from data_pipeline.sources.common import Root, record_or_rejection, root_of
from data_pipeline.sources.files import File, Files
from data_pipeline.sources.rows import parse, parts_of_rows, read_rows
from wemmu.config import prepare

Config = TypeVar("Config", bound=prepare.TableSource)


def columns(config: prepare.StoredSource, fields: Iterable[str]) -> dict[str, str]:
    """Return {config field: column} for the fields that name a column."""
    return {field: column for field in fields if (column := getattr(config, field)) is not None}


class TableSource(ABC, Generic[Config]):
    """A source whose records are rows."""

    version = 2
    # Config fields that name the columns of images and of texts.
    images: tuple[str, ...] = ("image",)
    texts: tuple[str, ...] = ("caption",)
    expected, pattern = "JSONL files, JSON arrays or Parquet files", "*.jsonl"

    def __init__(self, config: Config):
        self._config: Config = config
        self._images, self._texts = columns(config, self.images), columns(config, self.texts)
        self._files = Files(config.name, config.path, self.expected, self.pattern)

    @abstractmethod
    def _record(self, key: str, fields: dict[str, Any], root: Root | None) -> RawRecord:
        """Raise RejectedError if the row is not a record."""

    def files(self) -> list[tuple[str, int]]:
        return self._files.sizes()

    def parts(self, size: int) -> list[SourcePartition]:
        """Return parts of at most `size` rows, or of one Parquet row group if that has more."""
        self._root(None)
        return [part for file in self._files.find() for part in self._parts(file, size)]

    def _parts(self, file: File, size: int) -> Iterator[SourcePartition]:
        if file.broken:
            yield SourcePartition(self._config.name, file.name, file.place)
        elif self._is_parquet(file):
            yield from parquet.parts_of_groups(
                self._files, file, size, self._images, self._texts, paths=self._config.root is not None
            )
        else:
            yield from parts_of_rows(self._files, file, size, self._images | self._texts)

    def _is_parquet(self, file: File) -> bool:
        return file.name.endswith((".parquet", ".pq")) or parquet.begins(self._files, file)

    def read(self, part: SourcePartition) -> Iterator[RawRecord | Rejection]:
        if "broken" in part.place:
            yield part.rejection("", Reason.BAD_CONTAINER, part.place["broken"])
            return
        root = self._root(part)
        for row in self._rows(part):
            if isinstance(row, Rejection):
                yield row
            else:
                key, fields = row
                yield record_or_rejection(part, key, partial(self._made, key, fields, root))

    def _made(self, key: str, fields: Callable[[], dict[str, Any]], root: Root | None) -> RawRecord:
        return self._record(key, fields(), root)

    def _rows(self, part: SourcePartition) -> Iterator[tuple[str, Callable[[], dict[str, Any]]] | Rejection]:
        if "groups" in part.place:
            named = [*self._images.values(), *self._texts.values()]
            return parquet.read_groups(self._files, part, list(dict.fromkeys(named)))
        return ((key, partial(parse, row)) for key, row in read_rows(self._files, part))

    def _root(self, part: SourcePartition | None) -> Root | None:
        """Return the config's root, or the folder of the part's file."""
        config = self._config
        if config.root is not None:
            return root_of(config.name, config.root, config.also_below)
        if part is None:
            return None
        return Root(self._files.fs, posixpath.dirname(part.place["path"]), config.also_below)
