"""Parquet files: parts of whole row groups, read row by row."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_pipeline.records import Reason, RejectedError, Rejection, SourcePartition
from data_pipeline.sources.files import File, Files
from data_pipeline.sources.rows import check_fields
from wemmu.config import ConfigError

# Rows in memory at a time.
_BATCH = 32
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
# A file without any image has no type for the column.
_IMAGES = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_fixed_size_binary,
    pa.types.is_null,
)


def begins(files: Files, file: File) -> bool:
    """Return whether the file begins like Parquet, whatever its name."""
    with files.fs.open(file.path, "rb") as opened:
        return opened.read(4) == b"PAR1"


def parts_of_groups(
    files: Files, file: File, size: int, images: dict[str, str], texts: dict[str, str], paths: bool
) -> Iterator[SourcePartition]:
    """Return parts of at most `size` rows, or of one row group if that has more.

    Args:
        images, texts: {config field: column}.
        paths: whether an image may be a path.

    Raises:
        ConfigError: if a column is missing or there twice, or an image column has the wrong type.
    """
    try:
        with files.fs.open(file.path, "rb") as opened:
            parquet = pq.ParquetFile(opened)
            schema, metadata = parquet.schema_arrow, parquet.metadata
    except (pa.ArrowException, OSError) as error:
        _raise_unless_damaged(error)
        yield SourcePartition(files.source, file.name, file.place | {"broken": str(error)})
        return
    check_fields(files.source, file.path, schema.names or ["none"], images | texts)
    if twice := [column for column in (images | texts).values() if schema.names.count(column) > 1]:
        raise ConfigError(
            f"source {files.source}: path: {file.path} has several columns {twice[0]}; rename all but one"
        )
    for field, column in images.items():
        _check_images(f"source {files.source}", field, column, file, schema.field(column).type, paths)
    rows = [metadata.row_group(number).num_rows for number in range(metadata.num_row_groups)]
    for first, groups in _runs(rows, size):
        count = sum(rows[group] for group in groups)
        name = f"{file.name}:{first}-{first + count - 1}"
        yield SourcePartition(files.source, name, file.place | {"first": first, "groups": groups, "rows": count})


def _check_images(source: str, field: str, column: str, file: File, stored: pa.DataType, paths: bool) -> None:
    kind = stored
    if any(is_kind(kind) for is_kind in _LISTS):
        kind = kind.value_type
    # As pandas writes a categorical.
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if _is_text(kind) and not paths:
        raise ConfigError(
            f"{source}: root: the column {column} of {file.path} holds text; expected the "
            "folder of its paths, or any folder if it is base64"
        )
    if not (_is_text(kind) or _is_image(kind)):
        expected = "expected binary, a path, a struct of bytes and path, or a list of these"
        raise ConfigError(f"{source}: {field}: the column {column} of {file.path} is {stored}; {expected}")


def read_groups(
    files: Files, part: SourcePartition, columns: list[str]
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]] | Rejection]:
    """Yield the key ("FILE/ROW") of each row, and a function that returns its fields or raises RejectedError."""
    row = part.place["first"]
    with files.open(part) as opened:
        # Read through a small buffer; by default Arrow loads a whole row group into memory.
        parquet = pq.ParquetFile(opened, buffer_size=2**20, pre_buffer=False, page_checksum_verification=True)
        for group in part.place["groups"]:
            yield from _read_group(part, parquet, group, row, columns)
            row += parquet.metadata.row_group(group).num_rows


def _read_group(
    part: SourcePartition, parquet: pq.ParquetFile, group: int, row: int, columns: list[str]
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]] | Rejection]:
    """Yield the rows of a group, which starts at `row` of the file. A damaged page loses the rest of the group."""
    batches = parquet.iter_batches(_BATCH, row_groups=[group], columns=columns, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except (pa.ArrowException, OSError) as error:
            _raise_unless_damaged(error)
            lost = f"row group {group} from row {row} on: {error}"
            yield part.rejection("", Reason.BAD_CONTAINER, lost)
            return
        if batch is None:
            return
        for index in range(batch.num_rows):
            yield f"{part.place['file']}/{row + index}", partial(_fields, batch, index)
        row += batch.num_rows


def _runs(rows: list[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Yield first row and indices of consecutive row groups, from the groups' numbers of rows."""
    first, count = 0, 0
    groups: list[int] = []
    for group, rows_there in enumerate(rows):
        if groups and count + rows_there > size:
            yield first, groups
            first, count, groups = first + count, 0, []
        count, groups = count + rows_there, [*groups, group]
    if count:
        yield first, groups


def _fields(batch: pa.RecordBatch, index: int) -> dict[str, Any]:
    return {column: _value(batch, column, index) for column in batch.schema.names}


def _value(batch: pa.RecordBatch, column: str, index: int) -> Any:
    try:
        return batch.column(column)[index].as_py()
    except UnicodeDecodeError as error:
        raise RejectedError(Reason.BAD_TEXT, f"{column}: {error}") from error


def _raise_unless_damaged(error: Exception) -> None:
    """Arrow raises its own errors or a bare OSError for damage, and others for a failing disk or network."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_image(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 or kind.get_field_index("path") >= 0
    return any(is_kind(kind) for is_kind in _IMAGES)
