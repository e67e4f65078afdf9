"""Finds records whose images equal those of an earlier record byte by byte, before anything is written.

One pass over the sources writes an array of 64-bit hashes per part. The first record with a hash, in the order of the
parts, is kept, whichever worker reads it first; a record whose caption is refused does not count, as the next one with
its images may have a caption that fits. Among a hundred million records two different ones share a hash with
probability 3e-4; one of them would be dropped.
"""

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xxhash

from data_pipeline.chain import needs_caption, prompt_problem
from data_pipeline.ledger import partition_name
from data_pipeline.plan import Job
from data_pipeline.records import EncodedImage, RawRecord, Rejection, SourcePartition
from wemmu.config.files import replacing
from wemmu.config.shards import SCAN
from wemmu.config.task import Task

# For records that are compared with none: drawings, empty files, rejected records, refused captions.
NONE = np.uint64(0)
# Another instruction makes another record of the same images; another caption does not.
WITH_WORDS = (Task.EDIT, Task.MULTI_EDIT, Task.UNDERSTANDING)


def scan_file(root: Path, number: int) -> Path:
    return root / SCAN / f"{partition_name(number)}.npy"


class Scan(NamedTuple):
    """A scanned part: its number of records, and where its container breaks."""

    records: int
    lost: tuple[Rejection, ...]


def scan_part(job: Job, number: int, part: SourcePartition) -> Scan:
    """Write the hashes of a part's records, uint64, in reading order."""
    lost: list[Rejection] = []
    prepare, answers = job.prepare, job.tasks_of(part.source) == (Task.CAPTION,)

    def hashed(item: RawRecord | Rejection) -> np.uint64:
        if isinstance(item, Rejection):
            if item.reason.lost:
                lost.append(item)
            return NONE
        own = not answers and not (prepare.caption and needs_caption(item, prepare.caption.which == "all"))
        return NONE if own and prompt_problem(item, prepare.keep) else _hash(item)

    hashes = np.array([hashed(item) for item in job.read(part)], dtype=np.uint64)
    path = scan_file(job.root, number)
    with replacing(path) as aside, aside.open("wb") as file:
        np.save(file, hashes, allow_pickle=False)
    return Scan(len(hashes), tuple(lost))


def duplicates(root: Path, parts: int) -> list[frozenset[int]]:
    """Return for each part the indices of records that occurred before, in an earlier part or in this one.

    Takes about 40 bytes of memory per record.
    """
    hashes = [np.load(scan_file(root, number), allow_pickle=False) for number in range(parts)]
    everything = np.concatenate([*hashes, np.empty(0, np.uint64)])
    _, first = np.unique(everything, return_index=True)
    again = everything != NONE
    again[first] = False
    ends = np.cumsum([len(h) for h in hashes])[:-1]
    return [frozenset(np.flatnonzero(part).tolist()) for part in np.split(again, ends)]


def _hash(item: RawRecord) -> np.uint64:
    digest = xxhash.xxh3_64(item.task.value.encode())
    for image in (*item.images, item.target):
        if isinstance(image, EncodedImage) and image.data:
            digest.update(struct.pack("<Q", len(image.data)))
            digest.update(image.data)
        elif image is not None:
            return NONE
    if item.task in WITH_WORDS:
        digest.update((item.prompt or "").encode())
    return np.uint64(digest.intdigest() or 1)
