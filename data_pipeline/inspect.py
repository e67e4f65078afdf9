"""Shows what a directory of shards holds: our data sets and other MDS data sets."""

import io
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.text import Text

from data_pipeline.contents import Contents, look, records
from data_pipeline.report import number, streams_table
from data_pipeline.report_record import in_order
from wemmu.config.files import replacing
from wemmu.config.neighbours import instead
from wemmu.config.shards import DATASET_FILE, INDEX_FILE, SETTINGS_FILE, Bytes, ShardError, StoredRecord
from wemmu.mds import Shard, read_index
from wemmu.report.page import Table
from wemmu.report.sheet import Row, sectioned_sheet
from wemmu.report.text import plain, table

# Streams on the contact sheet, and records of each.
SECTIONS, SHOWN = 60, 6
WRITTEN = ("str", "json", "str_int", "str_float", "str_decimal")
NUMBERS = {"int": "<i8"} | {
    f"{kind}{8 * size}": f"<{kind[0]}{size}" for kind in ("uint", "int", "float") for size in (1, 2, 4, 8)
}
IMAGES = ("jpeg", "png", "bytes")
# Bytes of a column to print as text.
PRINTED = 2000


def inspect(root: Path, console: Console, sheet_file: Path | None = None) -> dict[str, Any]:
    """Print the streams of the data set in `root` and an example of each, or the columns of a foreign MDS data set.

    Write the first records of every stream into the PNG file `sheet_file`. Return what is printed, for JSON.

    Raises:
        ShardError: if `root` is neither, or if `sheet_file` is given for a foreign data set.
    """
    if (root / SETTINGS_FILE).exists() or (root / DATASET_FILE).exists():
        contents = look(root)
        found = _show(contents, console)
        if sheet_file is not None:
            streams = in_order(contents.streams)[:SECTIONS]
            if not streams:
                raise ShardError(f"{root} has no finished partition yet, so there are no images to draw")
            sections = [(s.settings.name, list(map(_row, islice(records(root, s), SHOWN)))) for s in streams]
            with replacing(sheet_file) as aside:
                sectioned_sheet(sections, SHOWN).save(aside, "PNG")
            console.print(Text(f"The first records of {len(streams)} streams: {sheet_file}"))
    elif (root / INDEX_FILE).exists():
        if sheet_file is not None:
            raise ShardError(f"{root} is not a data set of this project, so there are no images to show")
        found = _show_foreign(root, console)
    else:
        raise ShardError(
            f"{root} holds neither a data set of this project ({SETTINGS_FILE}) nor one of MDS shards ({INDEX_FILE})"
            f"{instead(root, 'shards')}"
        )
    return found


def _show(contents: Contents, console: Console) -> dict[str, Any]:
    state = "complete" if contents.complete else f"{contents.finished} of {contents.parts} partitions are finished"
    console.print(table(streams_table(f"{contents.root}: {state}", contents.streams)))
    streams = []
    for stream in in_order(contents.streams):
        record = next(records(contents.root, stream), None)
        if record is None:
            raise ShardError(
                f"{contents.root / stream.settings.name} holds no records, but should hold {stream.samples}; "
                "`wemmu data verify` names the damaged files"
            )
        example = {"id": record.id, "prompt": record.prompt, "answer": record.answer}
        sizes = {"inputs": list(map(size_of, record.images)), "target": size_of(record.target)}
        about = stream.model_dump(mode="json", exclude={"files"})
        streams.append(about.pop("settings") | about | {"name": stream.settings.name, "first": example | sizes})
        console.print(Text(f"{stream.settings.name}: {plain(record.id)}", "bold"), soft_wrap=True)
        for line in _lines(record):
            console.print(Text(f"  {line}"), soft_wrap=True)
    facts = {"complete": contents.complete, "partitions": contents.parts, "finished": contents.finished}
    return facts | {"streams": streams}


def _row(record: StoredRecord) -> Row:
    images = [Image.open(io.BytesIO(file)) for file in (*record.images, record.target) if file]
    words = plain(f"{record.prompt} → {record.answer}" if record.answer else record.prompt)
    return Row(words, images, made=bool(record.target))


def size_of(file: Bytes) -> str:
    """Return `HEIGHTxWIDTH` of an image file, read from its header; "" if it is not an image."""
    try:
        with Image.open(io.BytesIO(file)) as image:
            return f"{image.height}x{image.width}"
    except Exception:
        # Of as many kinds as Pillow has readers; all of them mean that it is not an image.
        return ""


def _lines(record: StoredRecord) -> list[str]:
    made = size_of(record.target) if record.target else "none of its own"
    lines = [f"inputs {', '.join(map(size_of, record.images)) or 'none'}; target {made}"]
    if record.latents:
        lines.append(f"latents of {', '.join(number(len(part)) for part in record.latents)} bytes")
    lines.append(f'prompt "{plain(record.prompt)}"' if record.prompt else "no prompt")
    return [*lines, f'answer "{plain(record.answer)}"'] if record.answer else lines


def _show_foreign(root: Path, console: Console) -> dict[str, Any]:
    shards = read_index(root)
    if not shards:
        raise ShardError(f"{root / INDEX_FILE} names no shards")
    first = shards[0]
    missing = [s for s in shards if not s.compression and not s.path.exists()]
    compressed = f", compressed as {first.compression}" if first.compression else ""
    size = sum(shard.bytes for shard in shards)
    console.print(Text(f"{root}: a set of MDS shards{compressed}", "bold"))
    samples = sum(shard.samples for shard in shards)
    console.print(Text(f"{number(samples)} records in {number(len(shards))} shards, {size / 1e6:,.1f} MB\n"))
    example = _example(first)
    rows = [
        (plain(name), plain(kind), str(first.sizes[name] or "vary"), example.get(name, "not read"))
        for name, kind in first.columns.items()
    ]
    console.print(table(Table("Columns", ("Column", "Encoding", ">Bytes", "In the first record"), rows)))
    notes = [f"shards missing: {len(missing)}, for example {missing[0].path}"] if missing else []
    notes += ["The shards do not all have the same columns"] if any(s.columns != first.columns for s in shards) else []
    notes += chain.from_iterable(_header_notes(shard) for shard in shards)
    for note in notes:
        console.print(Text(f"! {note}", "yellow"), soft_wrap=True)
    facts = {"records": samples, "shards": len(shards), "bytes": size, "compression": first.compression}
    return facts | {"columns": first.columns, "notes": notes}


def _header_notes(shard: Shard) -> list[str]:
    """Return the differences between shards and index; skip missing shards."""
    if shard.compression or not shard.path.exists():
        return []
    try:
        found = shard.header_samples()
    except ShardError as error:
        return [str(error)]
    return [f"{shard.path} has {found} records, the index says {shard.samples}"] if found != shard.samples else []


def _example(shard: Shard) -> dict[str, str]:
    """Describe the columns of the first record. Never opens pickles: they can run any code."""
    if shard.compression or not shard.path.exists():
        return {}
    try:
        record = next(shard.records(), {})
    except ShardError as error:
        return dict.fromkeys(shard.columns, str(error))
    return {name: _value(shard.columns[name], data) for name, data in record.items()}


def _value(encoding: str, data: Bytes) -> str:
    if encoding == "pkl":
        return f"a pickle of {number(len(data))} bytes: not opened, since it can run any code"
    if encoding in WRITTEN:
        return plain(str(data[:PRINTED], "utf-8", "replace"), 120)
    if encoding in NUMBERS and len(data) == np.dtype(NUMBERS[encoding]).itemsize:
        return str(np.frombuffer(data, NUMBERS[encoding])[0])
    if encoding in IMAGES and (size := size_of(data)):
        return f"an image, {size} px"
    return f"{number(len(data))} bytes"
