"""The steps that turn raw records into samples; `chain` runs all of them.

Each step is a generator over the previous one. A step passes a record that it cannot use to `reject`, with the reason,
and continues with the next.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from PIL import Image

from data_pipeline.images import decode
from data_pipeline.plan import Job
from data_pipeline.records import Drawing, EncodedImage, RawRecord, Reason, RejectedError, Rejection, SourcePartition
from wemmu.config.buckets import Size, beside, enlargement, nearest
from wemmu.config.prepare import ImageSizing, Keep
from wemmu.config.shards import LatentSettings, StreamSettings, checksum, pack
from wemmu.config.task import EDITS, Task
from wemmu.images import fit

Reject = Callable[[str, RejectedError], None]
# Images -> captions; a batch of stored images (files) of one size -> their latents as bytes.
Caption = Callable[[list[Image.Image]], list[str]]
Encode = Callable[[list[bytes]], list[bytes]]

# Tasks that need a prompt.
WORDED = (Task.T2I, Task.EDIT, Task.MULTI_EDIT, Task.UNDERSTANDING)


@dataclass(frozen=True)
class Services:
    """Models outside of the worker; None if the job uses none."""

    caption: Caption | None = None
    encode: Encode | None = None
    # The settings of `encode`'s latents for a bucket (height, width).
    latents: Callable[[Size], LatentSettings] | None = None


@dataclass(frozen=True)
class Decoded:
    """A record with upright RGB images; a Drawing stays a Drawing, because it can be drawn at every size."""

    raw: RawRecord
    images: tuple[Image.Image | Drawing, ...]
    target: Image.Image | Drawing | None

    @property
    def every_image(self) -> tuple[Image.Image | Drawing, ...]:
        return self.images if self.target is None else (*self.images, self.target)

    @property
    def shape(self) -> Size | None:
        """(height, width) of the image that decides the bucket: the target. None: any size, which words alone have."""
        deciding = next(iter(self.images), None) if self.target is None else self.target
        return None if deciding is None else shape_of(deciding)


def shape_of(image: Image.Image | Drawing) -> Size | None:
    """Return (height, width); None for a drawing of any size."""
    return (image.height, image.width) if isinstance(image, Image.Image) else image.size


@dataclass(frozen=True)
class SizedRecord:
    """A record at one resolution.

    `columns` are those of `wemmu.config.shards.COLUMNS` without the checksum, with lists instead of packed values and
    the record's key as id. `side` is the shorter side, in px, of the source image that decides the bucket.
    """

    stream: StreamSettings
    columns: dict[str, Any] = field(repr=False)
    side: int | None


def chain(
    part: SourcePartition,
    job: Job,
    dropped: frozenset[int],
    services: Services,
    reject: Reject,
    begun: Callable[[str], None],
) -> Iterator[SizedRecord]:
    """Yield every sample of the records of `part`. `dropped` are the indices of duplicates in the part.

    `begun` gets each record's key before anything is done with it.
    """
    read = _telling(job.read(part), begun)
    if job.tasks_of(part.source) == (Task.CAPTION,):
        read = map(to_caption, read)
    chosen = select_tasks(read, job, reject, dropped)
    records = decode_images(chosen, lambda file: decode(file, job.prepare.keep.max_pixels), reject)
    records = check_sizes(records, job.prepare.keep, reject)
    if services.caption is not None and job.prepare.caption is not None:
        again = job.prepare.caption.which == "all"
        records = add_captions(records, services.caption, again, job.prepare.caption.batch)
    records = check_prompts(records, job.prepare.keep, reject)
    samples = fit_to_buckets(records, job, reject)
    if services.encode is not None and services.latents is not None and job.prepare.latents is not None:
        samples = add_latents(samples, services.encode, services.latents, job.prepare.latents.batch)
    return samples


def _telling(items: Iterable[RawRecord | Rejection], begun: Callable[[str], None]) -> Iterator[RawRecord | Rejection]:
    for item in items:
        begun(item.key)
        yield item


def to_caption(item: RawRecord | Rejection) -> RawRecord | Rejection:
    """Turn a text-to-image record into one of its caption, which may be missing."""
    if isinstance(item, Rejection) or item.task is not Task.T2I or item.target is None:
        return item
    return replace(item, task=Task.CAPTION, prompt="", images=(item.target,), target=None, answer=item.prompt or "")


def select_tasks(
    items: Iterable[RawRecord | Rejection], job: Job, reject: Reject, dropped: frozenset[int] = frozenset()
) -> Iterator[RawRecord]:
    """Yield the records of the tasks in use."""
    for place, item in enumerate(items):
        if isinstance(item, Rejection):
            reject(item.key, RejectedError(item.reason, item.detail))
        elif place in dropped:
            reject(item.key, RejectedError(Reason.DUPLICATE))
        elif item.task not in job.resolutions:
            reject(item.key, RejectedError(Reason.UNUSED, item.task))
        else:
            yield item


def decode_images(
    records: Iterable[RawRecord], open_file: Callable[[EncodedImage], Image.Image], reject: Reject
) -> Iterator[Decoded]:
    """Open every image file with `open_file`, which raises RejectedError for damaged images."""

    def decoded(image: EncodedImage | Drawing) -> Image.Image | Drawing:
        return open_file(image) if isinstance(image, EncodedImage) else image

    for raw in records:
        try:
            images = tuple(decoded(image) for image in raw.images)
            yield Decoded(raw, images, None if raw.target is None else decoded(raw.target))
        except RejectedError as error:
            reject(raw.key, error)


def check_sizes(records: Iterable[Decoded], keep: Keep, reject: Reject) -> Iterator[Decoded]:
    """Drop records with an image that is too small or too elongated."""
    for record in records:
        sizes = [sorted(i.size) for i in record.every_image if isinstance(i, Image.Image)]
        if small := [s for s in sizes if s[0] < keep.min_side]:
            reject(record.raw.key, RejectedError(Reason.TOO_SMALL, f"its shorter side has {small[0][0]} px"))
        elif oblong := [s for s in sizes if s[1] / s[0] > keep.max_aspect]:
            reject(record.raw.key, RejectedError(Reason.TOO_OBLONG, f"{oblong[0][1]} by {oblong[0][0]} px"))
        else:
            yield record


def add_captions(records: Iterable[Decoded], caption: Caption, again: bool, batch: int) -> Iterator[Decoded]:
    """Write the missing captions, or all of them."""
    for group in _batches(records, batch):
        # A drawing has its own caption, which is exact, and no pixels yet.
        asked = {
            i: r.target
            for i, r in enumerate(group)
            if needs_caption(r.raw, again) and isinstance(r.target, Image.Image)
        }
        if asked:
            for i, text in zip(asked, caption(list(asked.values())), strict=True):
                group[i] = replace(group[i], raw=replace(group[i].raw, prompt=text))
        yield from group


def needs_caption(raw: RawRecord, again: bool) -> bool:
    """Whether a model writes the record's caption: a missing one, with `again` any."""
    return raw.task is Task.T2I and (again or not raw.words)


def check_prompts(records: Iterable[Decoded], keep: Keep, reject: Reject) -> Iterator[Decoded]:
    """Drop records whose task needs a prompt and whose prompt is missing, too short or too long."""
    for record in records:
        if problem := prompt_problem(record.raw, keep):
            reject(record.raw.key, problem)
        elif record.raw.task in WORDED:
            yield replace(record, raw=replace(record.raw, prompt=record.raw.words))
        else:
            yield record


def prompt_problem(raw: RawRecord, keep: Keep) -> RejectedError | None:
    """Return why `keep` refuses the record's prompt; None if it does not."""
    (shortest, longest), length = keep.caption_length, len(raw.words)
    if raw.task not in WORDED or shortest <= length <= longest:
        return None
    if not length:
        return RejectedError(Reason.NO_CAPTION)
    reason = Reason.CAPTION_TOO_SHORT if length < shortest else Reason.CAPTION_TOO_LONG
    return RejectedError(reason, f"{length} characters")


def fit_to_buckets(records: Iterable[Decoded], job: Job, reject: Reject) -> Iterator[SizedRecord]:
    """Yield a record at every resolution of its task, unless that enlarges it too much."""
    for record, stream, inputs in placed(records, job, reject):
        yield _sample(record, stream, inputs, job.prepare.images)


def placed(
    records: Iterable[Decoded], job: Job, reject: Reject
) -> Iterator[tuple[Decoded, StreamSettings, list[Size]]]:
    """Yield each record with its stream (without latents) and its inputs' buckets, at every usable resolution."""
    choices = job.buckets()
    for record in records:
        resolutions = job.resolutions[record.raw.task]
        places = list(usable_buckets(record, resolutions, choices, job.prepare.images.max_upscale))
        for resolution, (height, width), inputs in places:
            mixed = any(own != (height, width) for own in inputs)
            stream = StreamSettings(
                task=record.raw.task, resolution=resolution, height=height, width=width, inputs=len(inputs), mixed=mixed
            )
            yield record, stream, inputs
        if not places:
            shape = "by".join(f" {side} " for side in record.shape or ()).strip()
            reject(record.raw.key, RejectedError(Reason.TOO_SMALL, f"{shape} px fill no bucket of any resolution"))


def usable_buckets(
    record: Decoded, resolutions: Iterable[int], choices: dict[int, tuple[Size, ...]], max_upscale: float
) -> Iterator[tuple[int, Size, list[Size]]]:
    """Return the resolutions in `choices` that a record can serve, with its bucket and those of its inputs at each.

    Inputs of an edit have buckets of their own; those of other tasks have the record's.
    """
    shape = record.shape or (1, 1)
    for resolution in resolutions:
        bucket = nearest(shape, choices[resolution])
        inputs = [bucket] * len(record.images)
        if record.raw.task in EDITS:
            sizes = [shape_of(image) or shape for image in record.images]
            inputs = [beside(size, shape, bucket, choices[resolution]) for size in sizes]
        if all(enlargement(size, own) <= max_upscale for size, own in fits(record, bucket, inputs)):
            yield resolution, bucket, inputs


def fits(record: Decoded, bucket: Size, inputs: Sequence[Size]) -> Iterator[tuple[Size, Size]]:
    """Yield (height, width) of each image that has a size of its own, and its bucket."""
    for image, own in zip(record.every_image, (*inputs, bucket), strict=False):
        if isinstance(image, Image.Image):
            yield (image.height, image.width), own


def add_latents(
    samples: Iterable[SizedRecord], encode: Encode, latents: Callable[[Size], LatentSettings], batch: int
) -> Iterator[SizedRecord]:
    """Add the latents of every image, encoded in batches of one size."""
    waiting: dict[StreamSettings, list[SizedRecord]] = {}
    for sample in samples:
        group = waiting.setdefault(sample.stream, [])
        group.append(sample)
        if len(group) == batch:
            yield from _with_latents(waiting.pop(sample.stream), encode, latents)
    for group in waiting.values():
        yield from _with_latents(group, encode, latents)


def _with_latents(
    group: list[SizedRecord], encode: Encode, latents: Callable[[Size], LatentSettings]
) -> Iterator[SizedRecord]:
    # Of inputs in sizes of their own training encodes another grid than their own.
    files = [
        [s.columns["target"], *([b""] * s.stream.inputs if s.stream.mixed else s.columns["images"])] for s in group
    ]
    made = iter(encode([file for row in files for file in row if file]))
    stream = group[0].stream
    stream = stream.model_copy(update={"latents": latents((stream.height, stream.width))})
    for sample, row in zip(group, files, strict=True):
        found = [next(made) if file else b"" for file in row]
        yield replace(sample, stream=stream, columns={**sample.columns, "latents": found})


def _sample(record: Decoded, stream: StreamSettings, inputs: Sequence[Size], sizing: ImageSizing) -> SizedRecord:
    raw, bucket = record.raw, (stream.height, stream.width)
    return SizedRecord(
        stream,
        {
            "id": raw.key,
            "task": raw.task.value,
            "prompt": raw.prompt or "",
            "answer": raw.answer,
            "images": [image_file(image, own, sizing) for image, own in zip(record.images, inputs, strict=True)],
            "target": b"" if record.target is None else image_file(record.target, bucket, sizing),
            "latents": [],
        },
        None if record.shape is None else min(record.shape),
    )


def image_file(image: Image.Image | Drawing, bucket: Size, sizing: ImageSizing) -> bytes:
    """Return the image at the size of `bucket`, as a file to store."""
    image = fit(image, *bucket) if isinstance(image, Image.Image) else image.draw(*bucket)
    buffer = io.BytesIO()
    if sizing.format == "jpeg":
        image.save(buffer, "JPEG", quality=sizing.quality, subsampling=0)
    else:
        # Lossless at any level. Level 1 shrinks a rendered scene to a twentieth; level 6 saves a tenth more and takes
        # half as long again.
        image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def columns_of(sample: SizedRecord, source: str) -> dict[str, Any]:
    """Return the columns to store."""
    columns = {
        **sample.columns,
        "id": f"{source}/{sample.columns['id']}",
        "images": pack(sample.columns["images"]),
        "latents": pack(sample.columns["latents"]) if sample.columns["latents"] else b"",
    }
    return {**columns, "checksum": checksum(columns)}


def _batches(records: Iterable[Decoded], size: int) -> Iterator[list[Decoded]]:
    records = iter(records)
    while group := list(islice(records, size)):
        yield group
