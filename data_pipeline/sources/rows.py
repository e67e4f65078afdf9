"""JSONL files and JSON arrays in ranges of rows."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import IO, Any

from xxhash import xxh64

from data_pipeline.records import Reason, RejectedError, SourcePartition
from data_pipeline.sources.files import File, Files
from wemmu.config import ConfigError

# A JSON array of objects; a line of JSONL is never a list.
_ARRAY = re.compile(rb"(\xef\xbb\xbf)?\s*\[\s*([{\]]|$)")
# The beginning of a stream and of a file.
_ARROW = (b"\xff\xff\xff\xff", b"ARROW1")
_BOM = b"\xef\xbb\xbf"
# Bytes that identify the format of a file.
HEAD = 4096
# Each field of the config must occur in this many first rows of a file.
_LOOKED_AT = 100
_DECODER = json.JSONDecoder()


def parts_of_rows(files: Files, file: File, size: int, fields: dict[str, str]) -> Iterator[SourcePartition]:
    """Return parts of `size` rows each; reads the file once.

    A part's place has the digest of its bytes, so a changed line changes only its part, and appended lines change no
    earlier part. The images of the rows are not read.

    Raises:
        ConfigError: if one of `fields`, {config field: name}, is missing in all first rows, or the file is compressed.
    """
    with files.fs.open(file.path, "rb") as opened:
        head = opened.read(HEAD)
        if head.startswith(b"\x1f\x8b"):
            raise ConfigError(f"source {files.source}: path: {file.path} is compressed by gzip; unpack it with gunzip")
        if head.startswith(_ARROW):
            raise ConfigError(
                f"source {files.source}: path: {file.path} is an Arrow file, as of save_to_disk; write it as Parquet: "
                'datasets.load_from_disk("DIR").to_parquet("OUT.parquet")'
            )
        opened.seek(0)
        array = _ARRAY.match(head)
        try:
            rows = list(_elements(opened.read())) if array else []
        except ValueError as error:
            yield SourcePartition(
                files.source, file.name, file.place | {"broken": f"it is not a whole JSON array: {error}"}
            )
            return
        spans: Iterable[tuple[int, bytes]] = rows if array else _lines(opened)
        yield from _parts(files, file, _checked(spans, file, files.source, fields), size, bool(array))


def _parts(
    files: Files, file: File, spans: Iterable[tuple[int, bytes]], size: int, array: bool
) -> Iterator[SourcePartition]:
    first, count, start, end, digest = 1, 0, 0, 0, xxh64()

    def part() -> SourcePartition:
        place = {"path": file.path, "file": file.name, "first": first, "start": start, "end": end}
        place |= {"digest": digest.hexdigest()} | ({"array": True} if array else {})
        return SourcePartition(files.source, f"{file.name}:{first}-{first + count - 1}", place)

    for begin, row in spans:
        if count == size:
            yield part()
            first, count, start, digest = first + count, 0, begin, xxh64()
        if not count:
            start = begin
        count, end = count + 1, begin + len(row)
        digest.update(row)
    if count:
        yield part()


def read_rows(files: Files, part: SourcePartition) -> Iterator[tuple[str, bytes]]:
    """Yield key ("FILE/NUMBER", lines counted from 1) and content of every non-empty row of a part."""
    place = part.place
    with files.open(part) as opened:
        opened.seek(place["start"])
        if place.get("array"):
            rows: Iterable[tuple[int, bytes]] = _elements(b"[" + opened.read(place["end"] - place["start"]) + b"]")
        else:
            rows = _lines(opened, place["start"], place["end"], place["path"])
        for number, (_, row) in enumerate(rows, place["first"]):
            if row.removeprefix(_BOM).strip():
                yield f"{place['file']}/{number}", row


def parse(row: bytes) -> dict[str, Any]:
    """Raise RejectedError: BAD_TEXT, or BAD_RECORD if it is not a JSON object."""
    try:
        # Windows programs begin a file with a byte-order mark.
        value = json.loads(row.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RejectedError(Reason.BAD_TEXT, str(error)) from error
    except (ValueError, RecursionError) as error:
        raise RejectedError(Reason.BAD_RECORD, str(error)) from error
    if not isinstance(value, dict):
        raise RejectedError(Reason.BAD_RECORD, f"{type(value).__name__}, not a JSON object")
    return value


def _lines(lines: IO[bytes], start: int = 0, end: int | None = None, path: str = "") -> Iterator[tuple[int, bytes]]:
    """Yield offset and content of each line, from `start` to `end` (default: the end of the file)."""
    while end is None or start < end:
        line = lines.readline()
        if not line and end is not None:
            raise OSError(f"{path} has become shorter since it was scanned")
        if not line:
            return
        yield start, line
        start += len(line)


def _elements(array: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield offset and content of each element of a JSON array. Raises ValueError if the array is not whole."""
    # Decode one byte per character, so offsets are those of the file; JSON's syntax is ASCII.
    text = array.decode("latin-1")
    at = _skipped(text, 3 if array.startswith(_BOM) else 0) + 1
    at = _skipped(text, at)
    while text[at : at + 1] != "]":
        try:
            _, end = _DECODER.raw_decode(text, at)
        except RecursionError as error:
            raise ValueError(f"an element at byte {at} is nested too deeply") from error
        yield at, array[at:end]
        at = _skipped(text, end)
        if text[at : at + 1] == ",":
            at = _skipped(text, at + 1)
        elif text[at : at + 1] != "]":
            raise ValueError(f"no comma or end of the array at byte {at}")
    if text[at + 1 :].strip():
        raise ValueError(f"there is data after its end at byte {at}")


def _skipped(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _checked(
    spans: Iterable[tuple[int, bytes]], file: File, source: str, fields: dict[str, str]
) -> Iterator[tuple[int, bytes]]:
    """Yield `spans` after checking that the first have every field; unreadable ones are rejected later."""
    there: dict[str, None] = {}
    spans = iter(spans)
    first = list(islice(spans, _LOOKED_AT))
    wrong = ""
    for _, row in first:
        try:
            there |= dict.fromkeys(parse(row))
        except RejectedError as error:
            wrong = wrong or (str(error) if row.strip() else "")
    if wrong and not there:
        raise ConfigError(
            f"source {source}: path: none of the first {len(first)} rows of {file.path} is a JSON object ({wrong}); "
            "expected JSONL in UTF-8, a JSON array of objects or Parquet. pandas writes a CSV file as JSONL: "
            'pandas.read_csv("IN.csv").to_json("OUT.jsonl", orient="records", lines=True)'
        )
    check_fields(source, file.path, there, fields)
    yield from first
    yield from spans


def check_fields(source: str, where: str, there: Iterable[str], fields: dict[str, str]) -> None:
    """Raise ConfigError if one of `fields`, {config field: name}, is missing."""
    there = list(there)
    for field, name in fields.items():
        if there and name not in there:
            none = f", or {field}: null if there are none" if field == "caption" else ""
            raise ConfigError(
                f"source {source}: {field}: {where} has no column {name}; it has {', '.join(there)}. Set {field} "
                f"to the right one{none}"
            )
