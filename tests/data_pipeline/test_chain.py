"""The stages one by one: what passes, what is left out and why, and that nothing else changes on the way."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data_pipeline.chain import (
    Decoded,
    add_captions,
    add_latents,
    check_prompts,
    check_sizes,
    columns_of,
    decode_images,
    fit_to_buckets,
    to_caption,
)
from data_pipeline.images import decode
from data_pipeline.plan import Job
from data_pipeline.records import EncodedImage, RawRecord, Reason, RejectedError
from data_pipeline.sources.shapes import SceneDrawing
from wemmu.config.buckets import buckets, enlargement
from wemmu.config.prepare import ImageSizing, Keep, Prepare
from wemmu.config.shards import COLUMNS, LatentSettings, checksum, unpack
from wemmu.config.task import Task
from wemmu.shapes.scene import Scene


class Rejects:
    def __init__(self) -> None:
        self.reasons: dict[str, Reason] = {}

    def __call__(self, key: str, error: RejectedError) -> None:
        self.reasons[key] = error.reason


def image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def record(key: str, target: Image.Image | SceneDrawing | None, *images: Image.Image, **changes: object) -> Decoded:
    task = [Task.T2I, Task.EDIT, Task.MULTI_EDIT][min(len(images), 2)]
    return Decoded(RawRecord(**{"key": key, "task": task, "prompt": "words", **changes}), images, target)


def job(sizing: ImageSizing, **resolutions: tuple[int, ...]) -> Job:
    prepare = Prepare(sources=({"kind": "shapes", "samples": {"t2i": 1}},), images=sizing)
    return Job(Path("nowhere"), prepare, {Task(t): r for t, r in resolutions.items()}, None)


SMALL = ImageSizing(unit=16, max_aspect=2.0, format="png")


# ------------------------------------------------------------------------------------------------- kept and worded
def test_images_without_captions_are_kept_as_records_of_the_task_caption() -> None:
    rejects, photograph = Rejects(), image(64, 64)
    plain = record("plain", photograph, prompt=None)
    given = RawRecord("k", Task.T2I, None, target=EncodedImage("k.png", b""))
    found = to_caption(given)
    assert (found.task, found.images, found.target, found.answer) == (Task.CAPTION, (given.target,), None, "")
    assert to_caption(RawRecord("k", Task.T2I, "a cat", target=given.target)).answer == "a cat"
    kept = list(check_prompts([Decoded(found, (photograph,), None), plain], Keep(), rejects))
    assert [one.raw.key for one in kept] == ["k"]
    assert rejects.reasons == {"plain": Reason.NO_CAPTION}


def test_every_image_of_a_record_must_be_large_enough_and_not_too_oblong() -> None:
    rejects = Rejects()
    records = [
        record("fine", image(64, 48)),
        record("small", image(64, 47)),
        record("small input", image(64, 64), image(20, 64)),
        record("oblong", image(193, 48)),
        record("as oblong as allowed", image(192, 48)),
    ]
    passed = check_sizes(records, Keep(min_side=48, max_aspect=4.0), rejects)
    assert [r.raw.key for r in passed] == ["fine", "as oblong as allowed"]
    assert rejects.reasons == {
        "small": Reason.TOO_SMALL,
        "small input": Reason.TOO_SMALL,
        "oblong": Reason.TOO_OBLONG,
    }


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        (None, Reason.NO_CAPTION),
        ("  \n", Reason.NO_CAPTION),
        ("ab", Reason.CAPTION_TOO_SHORT),
        ("abcdefg", Reason.CAPTION_TOO_LONG),
        (" abc ", None),
    ],
)
def test_words_are_needed_where_the_task_has_words(prompt: str | None, reason: Reason | None) -> None:
    rejects, keep = Rejects(), Keep(caption_length=(3, 6))
    passed = [r.raw.prompt for r in check_prompts([record("it", image(8, 8), prompt=prompt)], keep, rejects)]
    assert (passed, rejects.reasons) == ((["abc"], {}) if reason is None else ([], {"it": reason}))
    wordless = record("it", None, image(8, 8), task=Task.RECONSTRUCTION, prompt=prompt)
    assert list(check_prompts([wordless], keep, rejects)) == [wordless]


# -------------------------------------------------------------------------------------------------------- bucketed
@given(st.integers(16, 300), st.integers(16, 300))
def test_a_record_goes_to_every_resolution_it_fills(width: int, height: int) -> None:
    rejects = Rejects()
    target = Image.new("RGB", (width, height), "teal")
    samples = list(fit_to_buckets([record("it", target)], job(SMALL, t2i=(32, 64, 128)), rejects))
    for sample in samples:
        bucket = sample.stream.height, sample.stream.width
        assert bucket in buckets(sample.stream.resolution, SMALL)
        assert enlargement((height, width), bucket) <= 1
        stored = Image.open(io.BytesIO(sample.columns["target"]))
        assert (stored.height, stored.width) == bucket
        assert sample.side == min(width, height)
    served = {sample.stream.resolution for sample in samples}
    # Who fills a resolution fills the lower ones, but for the rounding of the sides to 16 px.
    assert served in ({32, 64, 128}, {32, 64}, {32}, set()) or max(width, height) > 2 * min(width, height)
    assert bool(served) != (rejects.reasons == {"it": Reason.TOO_SMALL})


def test_inputs_of_an_edit_keep_their_own_shape_and_must_fill_their_bucket_too() -> None:
    rejects = Rejects()
    edits = [
        record("wide", image(100, 60), image(80, 100)),
        # Apart the target would be cropped to 5:3, and the input to a square.
        record("nearly as wide", image(104, 80), image(102, 80)),
        record("small input", image(100, 60), image(30, 30)),
        record("two inputs", image(64, 64), image(64, 64), image(99, 60)),
        # The target is the first input, and the shape of a record without buckets of their own is the first image's.
        record("question", None, image(64, 64), image(100, 64), task=Task.UNDERSTANDING),
    ]
    job_ = job(SMALL, edit=(64,), multi_edit=(64,), understanding=(64,))
    wide, near, two, question = fit_to_buckets(edits, job_, rejects)
    named = ["edit/64/48x80-mixed", "edit/64/48x80", "multi_edit/64/64x64x2-mixed", "understanding/64/64x64x2"]
    assert [sample.stream.name for sample in (wide, near, two, question)] == named
    sizes = [[Image.open(io.BytesIO(f)).size for f in sample.columns["images"]] for sample in (wide, near, two)]
    assert sizes == [[(64, 64)], [(80, 48)], [(64, 64), (80, 48)]]
    assert rejects.reasons == {"small input": Reason.TOO_SMALL}


def test_a_record_may_be_enlarged_as_far_as_stated() -> None:
    small = record("it", image(40, 40))
    for allowed, served in ((1.0, 0), (1.5, 0), (1.6, 1)):
        sizing = SMALL.model_copy(update={"max_upscale": allowed})
        assert len(list(fit_to_buckets([small], job(sizing, t2i=(64,)), Rejects()))) == served


def test_what_fits_its_bucket_is_stored_to_the_last_bit() -> None:
    square = image(64, 64)
    (sample,) = fit_to_buckets([record("it", square)], job(SMALL, t2i=(64,)), Rejects())
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(sample.columns["target"]))), np.asarray(square))
    columns = columns_of(sample, "source")
    assert columns.keys() == COLUMNS.keys()
    assert columns["id"] == "source/it"
    assert unpack(columns["images"]) == []
    assert columns["checksum"] == checksum(columns)
    for name in ("id", "prompt", "answer"):
        assert checksum({**columns, name: columns[name] + " "}) != columns["checksum"]


def test_jpeg_keeps_the_colours_of_thin_lines() -> None:
    """No chroma subsampling: a red line of one pixel on blue stays as red as JPEG lets it."""
    lines = np.zeros((64, 64, 3), np.uint8)
    lines[..., 2] = 255
    lines[:, ::4] = (255, 0, 0)
    image = Image.fromarray(lines)
    (sample,) = fit_to_buckets([record("it", image)], job(ImageSizing(unit=16, max_aspect=1.0), t2i=(64,)), Rejects())
    stored = np.asarray(Image.open(io.BytesIO(sample.columns["target"]))).astype(int)
    assert np.abs(stored - lines).mean() < 6


# ----------------------------------------------------------------------------------------------- decoded, captioned
def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_one_broken_image_leaves_out_its_record_only() -> None:
    whole, cut = png(image(32, 32)), png(image(32, 32))[:-40]
    raws = [
        RawRecord("a", Task.T2I, "words", (), EncodedImage("a.png", whole)),
        RawRecord("b", Task.EDIT, "words", (EncodedImage("in.png", cut),), EncodedImage("b.png", whole)),
        RawRecord("c", Task.T2I, "words", (), EncodedImage("c.png", whole)),
    ]
    rejects = Rejects()
    assert [r.raw.key for r in decode_images(raws, lambda file: decode(file, 10_000), rejects)] == ["a", "c"]
    assert rejects.reasons == {"b": Reason.TRUNCATED}


@pytest.mark.parametrize(("again", "expected"), [(False, ["told", "seen 9"]), (True, ["seen 8", "seen 9"])])
def test_captions_are_written_where_they_are_wanted(again: bool, expected: list[str]) -> None:
    asked: list[int] = []

    def caption(images: list[Image.Image]) -> list[str]:
        asked.append(len(images))
        return [f"seen {p.width}" for p in images]

    edit = record("edit", image(7, 7), image(7, 7), prompt=None)
    drawn = record("drawn", SceneDrawing(Scene("white", ())), prompt="exact")
    records = [record("a", image(8, 8), prompt="told"), record("b", image(9, 9), prompt=None), edit, drawn]
    out = list(add_captions(records, caption, again, batch=2))
    assert [r.raw.prompt for r in out] == [*expected, None, "exact"]
    assert asked == [2 if again else 1]


# --------------------------------------------------------------------------------------------------------- encoded
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_latents_meet_the_images_they_were_made_of(batch: int) -> None:
    sizes: set[int] = set()

    def encode(files: list[bytes]) -> list[bytes]:
        sizes.add(len({Image.open(io.BytesIO(f)).size for f in files}))
        return [b"of " + f for f in files]

    def settings(size: tuple[int, int]) -> LatentSettings:
        return LatentSettings(vae="v", scaling_factor=1, dtype="float32", channels=1, rows=size[0], columns=size[1])

    shapes = [(64, 64), (90, 50), (64, 64), (64, 64), (50, 90), (90, 50)]
    records = [record(str(i), image(*s, seed=i), image(*s, seed=10 + i)) for i, s in enumerate(shapes)]
    records.append(record("rec", None, image(64, 64, seed=99), task=Task.RECONSTRUCTION))
    job_ = job(SMALL, edit=(32, 64), reconstruction=(64,))
    plain = list(fit_to_buckets(records, job_, Rejects()))
    out = list(add_latents(iter(plain), encode, settings, batch))
    assert sizes == {1}
    assert len(out) == len(plain) == 13
    for sample in out:
        files = [sample.columns["target"], *sample.columns["images"]]
        assert sample.columns["latents"] == [b"of " + f if f else b"" for f in files]
        assert sample.stream.latents == settings((sample.stream.height, sample.stream.width))

    def order(samples: list) -> dict[str, list[str]]:
        streams: dict[str, list[str]] = {}
        for s in samples:
            streams.setdefault(s.stream.name, []).append(s.columns["id"])
        return streams

    assert order(out) == order(plain)
