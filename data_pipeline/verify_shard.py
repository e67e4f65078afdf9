"""Hashes one shard of a data set and checks every record in it."""

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray
from PIL import Image

from data_pipeline.swapped import Growth, growth
from wemmu.config.shards import Bytes, StoredRecord, StreamSettings, written_anew
from wemmu.mds import BrokenShardError, Shard
from wemmu.report.text import plain

# Problems to name per file, so that one bad shard does not hide the others.
NAMED = 10


@dataclass(frozen=True)
class Problem:
    """`record` is the index in the file, None for a problem of the file."""

    file: str
    record: int | None
    what: str
    remedy: str

    def __str__(self) -> str:
        where = self.file if self.record is None else f"{self.file}, record {self.record}"
        return f"{where}: {plain(self.what)}; {self.remedy}"


@dataclass(frozen=True)
class Checked:
    """What was found in one shard of `bytes`. `ids` are hashes of the records' ids, uint64, in their order."""

    bytes: int
    ids: NDArray[np.uint64]
    problems: list[Problem]
    growth: list[Growth] = field(default_factory=list)


@dataclass(frozen=True)
class Check:
    """A shard to check. `samples`: its number in the ledger, None if the shard is not in the ledger."""

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
    path, file, remedy = check.path, str(check.path), written_anew(check.root, check.settings.name, check.name)
    ids: list[int] = []
    problems: list[Problem] = []
    grown: list[Growth] = []
    try:
        with Shard.of_ours(path).opened() as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            size = opened.tell()
    except OSError as error:
        return Checked(0, np.empty(0, np.uint64), [Problem(file, None, str(error.strerror), remedy)])
    except BrokenShardError as error:
        return Checked(0, np.empty(0, np.uint64), [Problem(file, None, f"it {error.reason}", remedy)])
    if digest != check.sha256:
        problems.append(Problem(file, None, f"its sha256 is {digest}, not {check.sha256}", remedy))
    try:
        for number, columns in enumerate(Shard.of_ours(path).records()):
            ids.append(xxhash.xxh3_64_intdigest(columns["id"]))
            faults = record_problems(columns, check.settings)
            problems += [Problem(file, number, what, remedy) for what in faults]
            if not faults and (value := growth(columns, check.settings)):
                grown.append(value)
    except BrokenShardError as error:
        problems.append(Problem(file, None, f"it {error.reason}", remedy))
    else:
        if check.samples is not None and len(ids) != check.samples:
            problems.append(Problem(file, None, f"it has {len(ids)} records, the ledger says {check.samples}", remedy))
    if len(problems) > NAMED:
        more = f"{len(problems) - NAMED} more problems"
        problems = [*problems[:NAMED], Problem(file, None, more, remedy)]
    return Checked(size, np.array(ids, np.uint64), problems, grown)


def record_problems(columns: Mapping[str, Bytes], settings: StreamSettings) -> list[str]:
    """Return the problems of a record of the stream."""
    try:
        record = StoredRecord.of(columns)
    except ValueError as error:
        return [str(error)]
    images = [(file, settings.mixed) for file in record.images] + [(record.target, False)] * bool(record.target)
    found = [what for file, any_size in images for what in _image_problems(file, settings, any_size)]
    return record.misfits(settings) + found


def _image_problems(file: Bytes, settings: StreamSettings, any_size: bool) -> list[str]:
    # Pillow, not the decoder of training, so that two decoders accept the file.
    try:
        with Image.open(io.BytesIO(file), formats=("JPEG", "PNG")) as image:
            image.load()
    # Any exception: on damaged files Pillow raises OSError, SyntaxError, struct.error, zlib.error, ...
    except Exception as error:
        return [f"an image cannot be decoded ({error})"]
    if not any_size and image.size != (settings.width, settings.height):
        return [
            f"an image is {image.height} x {image.width} px (height x width) in a stream of {settings.height} x "
            f"{settings.width} px"
        ]
    return []
