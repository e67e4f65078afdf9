"""One shard of a data set: hashed, and every record in it checked."""

import hashlib
import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash
from PIL import Image

from data_pipeline.contents import StoredRecord, stored
from data_pipeline.mds import Shard
from data_pipeline.report_text import plain
from wemmu.config.shards import ShardError, StreamSettings, checksum, written_anew

# Of one file; a shard that is wrong in every record would hide the others.
NAMED = 10
ITEM_BYTES = {"float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Problem:
    """`record` is its place in the file, None if it is about the file."""

    file: str
    record: int | None
    what: str
    way_out: str

    def __str__(self) -> str:
        where = self.file if self.record is None else f"{self.file}, record {self.record}"
        return f"{where}: {plain(self.what)}; {self.way_out}"


@dataclass(frozen=True)
class Checked:
    """What was found in one shard. `ids` are hashes of the records' ids, uint64, in their order."""

    file: str
    records: int
    bytes: int
    ids: np.ndarray
    problems: list[Problem]


@dataclass(frozen=True)
class Check:
    """A shard to check. `samples` as the ledger has it, None if it has nothing of this shard."""

    root: Path
    settings: StreamSettings
    name: str
    sha256: str
    samples: int | None

    @property
    def path(self) -> Path:
        return self.root / self.settings.name / self.name


def check_shard(check: Check) -> Checked:
    """Hash a shard and check each of its records."""
    path, file, way_out = check.path, str(check.path), written_anew(check.root, check.settings.name, check.name)
    ids: list[int] = []
    problems: list[Problem] = []
    try:
        with path.open("rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            size = opened.tell()
    except OSError as error:
        return Checked(file, 0, 0, np.empty(0, np.uint64), [Problem(file, None, str(error.strerror), way_out)])
    if digest != check.sha256:
        problems.append(Problem(file, None, f"its sha256 is {digest}, not {check.sha256}", way_out))
    try:
        for number, columns in enumerate(Shard.of_ours(path).records()):
            ids.append(xxhash.xxh3_64_intdigest(columns["id"]))
            problems += [Problem(file, number, what, way_out) for what in record_problems(columns, check.settings)]
    except ShardError as error:
        problems.append(Problem(file, None, f"it {str(error).removeprefix(f'{file} ')}", way_out))
    else:
        if check.samples is not None and len(ids) != check.samples:
            problems.append(Problem(file, None, f"it has {len(ids)} records, the ledger says {check.samples}", way_out))
    if len(problems) > NAMED:
        more = f"{len(problems) - NAMED} more problems"
        problems = [*problems[:NAMED], Problem(file, None, more, way_out)]
    return Checked(file, len(ids), size, np.array(ids, np.uint64), problems)


def record_problems(columns: Mapping[str, bytes], settings: StreamSettings) -> list[str]:
    """What is wrong with a record of the stream."""
    if checksum(columns) != columns["checksum"]:
        return ["its checksum differs: it is damaged"]
    try:
        record = stored(dict(columns))
    except (ValueError, struct.error) as error:
        return [f"its columns are not of this layout ({error})"]
    found = []
    if record.task != settings.task:
        found.append(f"it is of the task {record.task} in a stream of {settings.task}")
    if len(record.images) != settings.inputs:
        found.append(f"it has {len(record.images)} input images in a stream of {settings.inputs}")
    images = [file for file in (*record.images, record.target) if file]
    if not images:
        found.append("it has no image")
    found += [what for file in images for what in _image_problems(file, settings)]
    return found + _latents_problems(record, settings)


def _image_problems(file: bytes, settings: StreamSettings) -> list[str]:
    try:
        with Image.open(io.BytesIO(file), formats=("JPEG", "PNG")) as image:
            image.load()
    # Anything at all: on damaged files Pillow's readers raise OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        return [f"an image cannot be decoded ({error})"]
    if image.size != (settings.width, settings.height):
        return [
            f"an image is {image.height} x {image.width} px (height x width) in a stream of {settings.height} x "
            f"{settings.width} px"
        ]
    return []


def _latents_problems(record: StoredRecord, settings: StreamSettings) -> list[str]:
    """Latents are of the target, then of each input; of a target that is the first input there are none of its own."""
    expected = []
    if (stored_as := settings.latents) is not None:
        each = stored_as.channels * stored_as.rows * stored_as.columns * ITEM_BYTES[stored_as.dtype]
        expected = [each if file else 0 for file in (record.target, *record.images)]
    lengths = [len(latents) for latents in record.latents]
    return [] if lengths == expected else [f"its latents have {lengths} bytes, not {expected}"]
