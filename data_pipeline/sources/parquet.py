"""Parquet files with a column of pictures and one of captions."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.records import Part, RawRecord, Reason, RejectedError, Rejection
from data_pipeline.sources.common import File, Files, Root, picture_of, record_or_rejection, root_of, text
from wemmu.config import ConfigError, Task, prepare

# Rows held in memory at a time.
_BATCH = 32


class ParquetSource:
    """Text-to-image records; a part is a run of whole row groups of one file."""

    version = 1

    def __init__(self, config: prepare.ParquetSource):
        self._config = config
        self._files = Files(config.name, config.path, "Parquet files")

    def parts(self, size: int) -> list[Part]:
        """At most `size` rows in each, unless a row group alone has more."""
        if self._config.root is not None:
            root_of(self._config.name, self._config.root)
        return [part for file in self._files.find() for part in self._file_parts(file, size)]

    def _file_parts(self, file: File, size: int) -> Iterator[Part]:
        place = {"path": file.path, "file": file.name, "size": file.size}
        try:
            with self._files.fs.open(file.path, "rb") as opened:
                parquet = pq.ParquetFile(opened)
                schema, metadata = parquet.schema_arrow, parquet.metadata
        except (pa.ArrowException, OSError) as error:
            _raise_unless_damaged(error)
            yield Part(self._config.name, file.name, place | {"broken": str(error)})
            return
        self._check(file, schema)
        rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
        for first, groups in _runs(rows, size):
            count = sum(rows[group] for group in groups)
            name = f"{file.name}:{first}-{first + count - 1}"
            yield Part(self._config.name, name, place | {"first": first, "groups": groups, "rows": count})

    def _check(self, file: File, schema: pa.Schema) -> None:
        source, image = f"source {self._config.name}", self._config.image
        if image not in schema.names:
            raise ConfigError(f"{source}: image: {file.path} has no column {image}; it has {', '.join(schema.names)}")
        kind = schema.field(image).type
        if _is_text(kind) and self._config.root is None:
            raise ConfigError(f"{source}: root: the column {image} of {file.path} holds paths; expected their root")
        if not (_is_text(kind) or _is_picture(kind)):
            expected = "expected binary, a path, or a struct of bytes and path"
            raise ConfigError(f"{source}: image: the column {image} of {file.path} is {kind}; {expected}")

    def read(self, part: Part) -> Iterator[RawRecord | Rejection]:
        if "broken" in part.place:
            yield Rejection(part.source, part.name, "", Reason.BAD_CONTAINER, part.place["broken"])
            return
        root = None if self._config.root is None else root_of(self._config.name, self._config.root)
        row = part.place["first"]
        with self._files.open(part) as opened:
            # Piece by piece through a small buffer; by default Arrow takes a row group into memory as a whole.
            parquet = pq.ParquetFile(opened, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True)
            for group in part.place["groups"]:
                yield from self._read_group(part, parquet, group, row, root)
                row += parquet.metadata.row_group(group).num_rows

    def _read_group(
        self, part: Part, parquet: pq.ParquetFile, group: int, row: int, root: Root | None
    ) -> Iterator[RawRecord | Rejection]:
        """The rows of a group, whose first is `row` of the file. Behind a damaged page the rest of it is lost."""
        columns = [self._config.image, self._config.caption]
        batches = parquet.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False)
        while True:
            try:
                batch = next(batches, None)
            except (pa.ArrowException, OSError) as error:
                _raise_unless_damaged(error)
                lost = f"row group {group} from row {row} on: {error}"
                yield Rejection(part.source, part.name, "", Reason.BAD_CONTAINER, lost)
                return
            if batch is None:
                return
            for index in range(batch.num_rows):
                key = f"{part.place['file']}/{row + index}"
                yield record_or_rejection(part, key, partial(self._record, key, batch, index, root))
            row += batch.num_rows

    def _record(self, key: str, batch: pa.RecordBatch, index: int, root: Root | None) -> RawRecord:
        caption = self._config.caption
        prompt = text(_value(batch, caption, index), caption) if caption in batch.schema.names else None
        picture = picture_of(_value(batch, self._config.image, index), key, root)
        return RawRecord(key, Task.T2I, prompt, target=picture)


def _runs(rows: list[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """First row and numbers of consecutive row groups, of the numbers of rows that the groups have."""
    first, count = 0, 0
    groups: list[int] = []
    for group, rows_there in enumerate(rows):
        if groups and count + rows_there > size:
            yield first, groups
            first, count, groups = first + count, 0, []
        count, groups = count + rows_there, [*groups, group]
    if count:
        yield first, groups


def _value(batch: pa.RecordBatch, column: str, index: int) -> Any:
    try:
        return batch.column(column)[index].as_py()
    except UnicodeDecodeError as error:
        raise RejectedError(Reason.BAD_TEXT, f"{column}: {error}") from error


def _raise_unless_damaged(error: Exception) -> None:
    """Arrow reports damage by its own errors or a bare OSError; a disk or a network that fails, by others."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
    # A file in which no row has a picture has lost the type.
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_null(kind)
