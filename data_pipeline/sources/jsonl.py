"""JSONL files in ranges of lines, and what the sources that are made of them share."""

import json
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import partial
from typing import IO, Any, Generic, TypeVar

from xxhash import xxh64

from data_pipeline.records import Part, RawRecord, Reason, RejectedError, Rejection
from data_pipeline.sources.common import Files, Root, record_or_rejection, root_of, text
from wemmu.config import prepare

Config = TypeVar("Config", prepare.FolderSource, prepare.EditsSource)


class JsonLinesSource(ABC, Generic[Config]):
    """A source whose records are lines, with picture paths that start at a root."""

    version = 1

    def __init__(self, config: Config):
        self._config = config
        self._files = Files(config.name, config.path, "JSONL files")

    def parts(self, size: int) -> list[Part]:
        if self._config.root is not None:
            root_of(self._config.name, self._config.root)
        return _line_parts(self._files, size)

    def read(self, part: Part) -> Iterator[RawRecord | Rejection]:
        if self._config.root is None:
            root = Root(self._files.fs, posixpath.dirname(part.place["path"]))
        else:
            root = root_of(self._config.name, self._config.root)
        for key, line in _read_lines(self._files, part):
            yield record_or_rejection(part, key, partial(self._record, key, line, root))

    @abstractmethod
    def _record(self, key: str, line: bytes, root: Root) -> RawRecord:
        """Raises RejectedError: if the line is no record."""


def parse(line: bytes) -> dict[str, Any]:
    """Raises RejectedError: BAD_TEXT, or BAD_RECORD if it is not a JSON object."""
    try:
        # Programs on Windows begin a file with a byte-order mark.
        value = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RejectedError(Reason.BAD_TEXT, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise RejectedError(Reason.BAD_RECORD, str(error)) from error
    if not isinstance(value, dict):
        raise RejectedError(Reason.BAD_RECORD, f"not a JSON object but {type(value).__name__}")
    return value


def path_field(record: dict[str, Any], field: str) -> str:
    """Raises RejectedError: BAD_RECORD if the field is not there or no path, BAD_TEXT."""
    value = text(record.get(field), field)
    if not value:
        raise RejectedError(Reason.BAD_RECORD, f"{field} is missing")
    return value


def _line_parts(files: Files, size: int) -> list[Part]:
    """Parts of `size` lines each, found by reading every file once, a line at a time.

    A part's place has the digest of its bytes, so that a changed line changes its part alone and new lines at the end
    of a file leave the parts before as they are. The pictures that the lines name are not looked at.
    """
    parts = []
    for file in files.find():
        with files.fs.open(file.path, "rb") as lines:
            for first, count, start, end, digest in _ranges(lines, size):
                place = {"path": file.path, "file": file.name, "first": first, "start": start, "end": end}
                name = f"{file.name}:{first}-{first + count - 1}"
                parts.append(Part(files.source, name, place | {"digest": digest}))
    return parts


def _ranges(lines: IO[bytes], size: int) -> Iterator[tuple[int, int, int, int, str]]:
    """First line (from 1), number of lines, first byte, byte after the last, digest."""
    first, count, start, end, digest = 1, 0, 0, 0, xxh64()
    for line in lines:
        if count == size:
            yield first, count, start, end, digest.hexdigest()
            first, count, start, digest = first + count, 0, end, xxh64()
        count, end = count + 1, end + len(line)
        digest.update(line)
    if count:
        yield first, count, start, end, digest.hexdigest()


def _read_lines(files: Files, part: Part) -> Iterator[tuple[str, bytes]]:
    """Key ("FILE/LINE", as editors number them) and content of every line of a part that is not empty."""
    place = part.place
    with files.open(part) as lines:
        position, number = lines.seek(place["start"]), place["first"]
        while position < place["end"]:
            line = lines.readline()
            if not line:
                raise OSError(f"{place['path']} has become shorter since it was looked through")
            if line.strip():
                yield f"{place['file']}/{number}", line
            position, number = position + len(line), number + 1
