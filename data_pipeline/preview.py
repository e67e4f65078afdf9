"""Previews the buckets: the sizes of each resolution, and the buckets of a sample of every source.

Of images only the headers are read, so this takes seconds where writing takes hours.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import islice

from PIL import Image

from data_pipeline.chain import check_prompts, check_sizes, decode_images, fits, placed, select_tasks
from data_pipeline.images import decode
from data_pipeline.plan import Job
from data_pipeline.records import EncodedImage, RawRecord, Reason, RejectedError, Rejection, SourcePartition
from wemmu.config import prepare
from wemmu.config.buckets import Size, cut, enlargement
from wemmu.config.shards import StreamSettings
from wemmu.images import upright_size

# Parts of a source to sample from, evenly spaced.
SPREAD = 32
# The miniature has no files to open, so the sample can be larger.
DRAWN = 100_000


class Header(Image.Image):
    """An image with a known size, upright (width, height), and no pixels."""

    def __init__(self, size: tuple[int, int]):
        super().__init__()
        self._size = size


@dataclass
class Survey:
    """Statistics of a source from a sample.

    `looked` is the size of the sample; `records` the number of all records, `exact` if it is not an estimate.
    """

    name: str
    kind: str
    parts: int
    looked: int = 0
    records: int = 0
    exact: bool = True
    streams: Counter[StreamSettings] = field(default_factory=Counter)
    # (resolution, bucket) -> (share cut off, enlargement) of each image that has a size of its own.
    fits: dict[tuple[int, Size], list[tuple[float, float]]] = field(default_factory=dict)
    reasons: Counter[Reason] = field(default_factory=Counter)
    examples: dict[Reason, Rejection] = field(default_factory=dict)

    def scaled(self, count: int) -> int:
        """Scale a count of the sample to the whole source."""
        return round(count * self.records / self.looked) if self.looked else 0


def survey(job: Job, config: prepare.Source, sample: int) -> Survey:
    """Read `sample` records of a source, or all if it has fewer.

    The number of records is exact if all parts were read to their end. Otherwise the first part is, and the estimate
    extrapolates from it.
    """
    source = job.source(config.name)
    parts = source.parts(job.prepare.partition)
    sample = sample if isinstance(config, prepare.StoredSource) else max(sample, DRAWN)
    found = Survey(config.name, config.kind, len(parts))
    chosen = [parts[i * len(parts) // min(SPREAD, len(parts))] for i in range(min(SPREAD, len(parts)))]
    whole = []
    for part in chosen:
        items = iter(job.read(part))
        looked = list(islice(items, -(-sample // len(chosen))))
        _look(looked, part, job, found)
        found.looked += len(looked)
        if part is chosen[0]:
            whole.append(len(looked) + sum(1 for _ in items))
        elif next(items, None) is None:
            whole.append(len(looked))
    found.exact = len(whole) == len(parts)
    found.records = sum(whole) if found.exact else round(sum(whole) / len(whole) * len(parts))
    return found


def _look(items: Iterable[RawRecord | Rejection], part: SourcePartition, job: Job, found: Survey) -> None:
    """Send the records of a part through the chain, with headers for images."""

    def reject(key: str, error: RejectedError) -> None:
        if error.reason is Reason.UNUSED:
            return
        found.reasons[error.reason] += 1
        found.examples.setdefault(error.reason, part.rejection(key, error.reason, error.detail))

    keep = job.prepare.keep
    if job.prepare.caption is not None:
        # Missing captions will be written.
        keep = keep.model_copy(update={"caption_length": (0, keep.caption_length[1])})
    records = decode_images(select_tasks(items, job, reject), lambda file: header(file, keep.max_pixels), reject)
    for record, stream, inputs in placed(check_prompts(check_sizes(records, keep, reject), keep, reject), job, reject):
        found.streams[stream] += 1
        for size, own in fits(record, (stream.height, stream.width), inputs):
            found.fits.setdefault((stream.resolution, own), []).append((cut(size, own), enlargement(size, own)))


def header(image: EncodedImage, max_pixels: int) -> Header:
    """Read the size from the header; raises RejectedError like `data_pipeline.images.decode`."""
    return Header(decode(image, max_pixels, upright_size))
