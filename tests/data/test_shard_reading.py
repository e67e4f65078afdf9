"""What is read is what was written; anything else is named, and stops the reader or is left out, as it was told."""

import io
import os
import shutil
import struct
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data import handmade
from tests.data.handmade import PARTITION, Record, make_curriculum, photographs, pixels, rewrite, shapes, stream
from wemmu.config.shards import DATASET_FILE, INDEX_FILE, DataSet, LatentSettings, ShardError
from wemmu.config.task import Task
from wemmu.data.shards import DecodedRecord, ShardStream
from wemmu.data.streams import open_streams

SHARD = Path("edit/32/32x32/00001/shard.00000.mds")
# Records of the stream that are in it.
LOST = range(PARTITION, 2 * PARTITION)
pytestmark = pytest.mark.filterwarnings("error")


def opened(root: Path, *tasks: Task, resolution: int = 32, **changes: object) -> list[ShardStream]:
    return open_streams(make_curriculum(root, **changes).data, tasks, resolution)


def same(one: DecodedRecord, other: DecodedRecord) -> bool:
    return (one.id, one.prompt) == (other.id, other.prompt) and all(
        torch.equal(getattr(one, field), getattr(other, field)) for field in ("images", "target")
    )


def flip_in_the_middle(path: Path) -> None:
    rewrite(path, lambda content: content.__setitem__(len(content) // 2, content[len(content) // 2] ^ 1))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


# -------------------------------------------------------------------------------------------------- what was written
@pytest.mark.parametrize("task", [Task.T2I, Task.RECONSTRUCTION, Task.UNCONDITIONAL, Task.EDIT, Task.MULTI_EDIT])
def test_png_gives_every_record_back_exactly(shards: Path, task: Task) -> None:
    (found,) = opened(shards, task)
    written = shapes(task, handmade.SAMPLES[task])
    assert len(found) == len(written)
    for sample, record in zip((found[i] for i in range(len(found))), written, strict=True):
        target = record.images[0] if record.target is None else record.target
        assert (sample.id, sample.prompt) == (record.id, record.prompt)
        assert sample.images.shape == (len(record.images), 3, 32, 32)
        assert np.array_equal(sample.images, np.array([pixels(i) for i in record.images]).reshape(sample.images.shape))
        assert np.array_equal(sample.target, pixels(target))


def test_jpeg_gives_photographs_back_as_pil_decodes_them(tmp_path: Path) -> None:
    records = photographs(9, (96, 64))
    handmade.write(tmp_path, {stream(Task.T2I, 96, 64): records}, "JPEG")
    (found,) = opened(tmp_path, Task.T2I)
    for number, record in enumerate(records):
        decoded = pixels(Image.open(io.BytesIO(handmade.file_of(record.target, "JPEG"))))
        assert np.abs(found[number].target.numpy().astype(int) - decoded).max() <= 1  # two builds of libjpeg
        assert np.abs(decoded.astype(int) - pixels(record.target)).mean() < 3


def test_grey_images_come_as_rgb(tmp_path: Path) -> None:
    grey = photographs(1)[0].target.convert("L")
    handmade.write(tmp_path, {stream(Task.T2I): [Record("grey", "a face", (), grey)]})
    (found,) = opened(tmp_path, Task.T2I)
    assert np.array_equal(found[0].target, pixels(grey))


# ------------------------------------------------------------------------------------------- which stream serves what
def test_streams_come_in_the_order_of_the_tasks_and_those_that_are_not_there_are_named(shards: Path) -> None:
    tasks = [Task.MULTI_EDIT, Task.EDIT, Task.T2I]
    assert [s.settings.task for s in opened(shards, *tasks)] == tasks
    with pytest.raises(ShardError, match=r"no record for t2i at 64 px.*edit/32/32x32"):
        opened(shards, Task.T2I, resolution=64)


def test_text_to_image_records_stand_in_for_tasks_without_their_own(tmp_path: Path) -> None:
    sizes = [(32, 32), (32, 48)]
    handmade.write(tmp_path, {stream(Task.T2I, *size): shapes(Task.T2I, 5, size) for size in sizes})
    words = opened(tmp_path, Task.T2I)
    for task, inputs in ((Task.RECONSTRUCTION, 1), (Task.UNCONDITIONAL, 0)):
        made = opened(tmp_path, task)
        assert [(s.settings.name, s.settings.inputs, len(s)) for s in made] == [
            (f"{task}/32/{height}x{width}", inputs, 5) for height, width in sizes
        ]
        for source, derived in zip(words, made, strict=True):
            for a, b in ((source[i], derived[i]) for i in range(5)):
                assert (b.id, b.prompt) == (a.id, "")
                assert torch.equal(b.target, a.target)
                assert torch.equal(b.images, a.target[None].expand(inputs, -1, -1, -1))


def test_records_of_their_own_are_preferred(shards: Path) -> None:
    for task in (Task.RECONSTRUCTION, Task.UNCONDITIONAL):
        (found,) = opened(shards, task)
        assert {found[i].id for i in range(len(found))} == {r.id for r in shapes(task, handmade.SAMPLES[task])}


def test_no_other_task_is_made_of_text_to_image_records(tmp_path: Path) -> None:
    handmade.write(tmp_path, {stream(Task.T2I): shapes(Task.T2I, 3)})
    with pytest.raises(ShardError, match=r"no record for edit at 32 px. It has t2i/32/32x32"):
        opened(tmp_path, Task.EDIT)
    with pytest.raises(ShardError, match=r"no record for reconstruction at 64 px"):
        opened(tmp_path, Task.RECONSTRUCTION, resolution=64)


# ------------------------------------------------------------------------------------------------------------ damage
def test_an_incomplete_data_set_is_refused(copy: Path) -> None:
    (copy / DATASET_FILE).unlink()
    with pytest.raises(ShardError, match="no complete data set"):
        opened(copy, Task.T2I)


@pytest.mark.parametrize(("damage", "words"), [(truncate, "damaged"), (Path.unlink, "missing")])
def test_a_shard_that_is_missing_or_short_is_found_when_the_stream_is_opened(
    copy: Path, damage: Callable[[Path], None], words: str
) -> None:
    damage(copy / SHARD)
    with pytest.raises(ShardError, match=f"{SHARD} is {words}") as caught:
        opened(copy, Task.T2I, Task.EDIT)
    remedy = [f"{copy}/{name}" for name in ("edit/32/32x32/00001", "ledger/00001.json", DATASET_FILE)]
    assert f"delete {', '.join(remedy)} and run `wemmu data write" in str(caught.value)
    opened(copy, Task.T2I)


@pytest.mark.parametrize("damaged", ["stop", "skip"])
@pytest.mark.parametrize(
    ("damage", "words"), [(flip_in_the_middle, "damaged"), (truncate, "damaged"), (Path.unlink, "missing")]
)
def test_a_damaged_index_is_always_refused(copy: Path, damage: Callable, words: str, damaged: str) -> None:
    damage(copy / "edit/32/32x32" / INDEX_FILE)
    with pytest.raises(ShardError, match=rf"edit/32/32x32/index.json is {words}.*delete .*dataset.json and run"):
        opened(copy, Task.EDIT, damaged=damaged)


def test_an_index_of_other_shards_than_recorded_is_refused(copy: Path) -> None:
    dataset = DataSet.at(copy)
    changed = tuple(s.model_copy(update={"samples": s.samples + 1}) for s in dataset.streams)
    dataset.model_copy(update={"streams": changed}).save(copy / DATASET_FILE)
    with pytest.raises(ShardError, match="recorded with 27 samples in 4 shard files, its index has 26 in 4"):
        opened(copy, Task.EDIT)


@pytest.fixture(scope="module")
def playground(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, list[DecodedRecord]]:
    """A shard file to be damaged again and again, its whole content, and its records."""
    root = Path(shutil.copytree(shards, tmp_path_factory.mktemp("playground") / "shards"))
    (found,) = opened(root, Task.EDIT)
    return root, (root / SHARD).read_bytes(), [found[i] for i in LOST]


def records_or_refused(root: Path, written: list[DecodedRecord], found: ShardStream) -> int:
    """How many of the shard's records are refused; the others must be what was written."""
    refusals = []
    for number, record in zip(LOST, written, strict=True):
        try:
            assert same(found[number], record)
        except ShardError as error:
            refusals.append((str(error), f"{SHARD} is damaged in record {number - LOST.start} ("))
    assert all(words in message for message, words in refusals)
    return len(refusals)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_bit_can_flip_unnoticed(playground: tuple[Path, bytes, list[DecodedRecord]], data: st.DataObject) -> None:
    root, content, written = playground
    (root / SHARD).write_bytes(content)
    (found,) = opened(root, Task.EDIT)
    # A third of the draws in the offsets.
    header = st.integers(0, 4 * (PARTITION + 2) - 1)
    at = data.draw(header | st.integers(0, len(content) - 1) | st.integers(0, len(content) - 1))
    bit = data.draw(st.integers(0, 7))
    rewrite(root / SHARD, lambda c: c.__setitem__(at, c[at] ^ 1 << bit))
    # An offset ends one record and begins another. Of the format's own bytes some are of no consequence.
    assert records_or_refused(root, written, found) <= 2


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_truncation_goes_unnoticed(playground: tuple[Path, bytes, list[DecodedRecord]], data: st.DataObject) -> None:
    """Of a stream that was whole when it was opened."""
    root, content, written = playground
    (root / SHARD).write_bytes(content)
    (found,) = opened(root, Task.EDIT)
    os.truncate(root / SHARD, data.draw(st.integers(0, len(content) - 1)))
    assert records_or_refused(root, written, found) >= 1


def test_a_record_read_through_the_offset_of_another_is_refused(
    playground: tuple[Path, bytes, list[DecodedRecord]],
) -> None:
    """The one damage that a checksum alone would let pass."""
    root, content, written = playground
    (root / SHARD).write_bytes(content)
    (found,) = opened(root, Task.EDIT)
    rewrite(root / SHARD, lambda c: c.__setitem__(slice(12, 16), c[8:12]))
    assert records_or_refused(root, written, found) == 2
    with pytest.raises(ShardError, match="whose columns take"):
        found[LOST.start + 2]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            Record("odd", "", (), photographs(1, (32, 48))[0].target),
            r"image of \(32, 48\) px in a stream of \(32, 32\)",
        ),
        (Record("odd", "", (photographs(1)[0].target,), photographs(1)[0].target), "1 input images in a stream of 0"),
        (Record("odd", "no image"), "no image"),
    ],
)
def test_a_record_that_does_not_fit_its_stream_is_refused(tmp_path: Path, record: Record, words: str) -> None:
    handmade.write(tmp_path, {stream(Task.T2I): [record, *shapes(Task.T2I, 2)]})
    (found,) = opened(tmp_path, Task.T2I)
    with pytest.raises(ShardError, match=rf"shard.00000.mds is damaged in record 0, odd \(.*{words}"):
        found[0]
    assert found[1].prompt == shapes(Task.T2I, 1)[0].prompt


def test_bytes_that_are_no_image_are_refused(tmp_path: Path) -> None:
    row = {**handmade.columns(Task.T2I, shapes(Task.T2I, 1)[0]), "target": b"not an image"}
    row["checksum"] = handmade.checksum(row)
    handmade.write_columns(tmp_path, {stream(Task.T2I): [row]})
    (found,) = opened(tmp_path, Task.T2I)
    with pytest.raises(ShardError, match="cannot be decoded"):
        found[0]


# -------------------------------------------------------------------------------------------------------- skip damage
def test_a_damaged_record_is_replaced_by_the_next_and_counted(copy: Path) -> None:
    (whole,) = opened(copy, Task.EDIT)
    content = (copy / SHARD).read_bytes()
    offsets = struct.unpack_from(f"<{PARTITION + 1}I", content, 4)
    written = [whole[i] for i in range(len(whole))]
    for record in (2, 3, 6):
        rewrite(copy / SHARD, lambda c, at=offsets[record + 1] - 1: c.__setitem__(at, c[at] ^ 1))
    (found,) = opened(copy, Task.EDIT, damaged="skip")
    with pytest.warns(UserWarning, match=rf"goes on without: .*{SHARD} is damaged in record 2 \(") as warned:
        read = [found[i] for i in (*range(len(found)), 9)]
    expected = [*range(9), 11, 11, 11, 12, 14, *range(14, 26), 11]
    assert all(same(sample, written[i]) for sample, i in zip(read, expected, strict=True))
    assert len(warned) == 1
    assert found.skipped == {(str(SHARD), 2): 2, (str(SHARD), 3): 1, (str(SHARD), 6): 1}


@pytest.mark.parametrize("damage", [truncate, Path.unlink])
@pytest.mark.parametrize("name", [SHARD, Path("edit/32/32x32/00003/shard.00000.mds")])
def test_a_shard_that_is_missing_or_short_is_skipped_as_a_whole(copy: Path, damage: Callable, name: Path) -> None:
    (whole,) = opened(copy, Task.EDIT)
    written = [whole[i] for i in range(len(whole))]
    damage(copy / name)
    with pytest.warns(UserWarning, match=f"goes on without: .*{name} is") as warned:
        (found,) = opened(copy, Task.EDIT, damaged="skip")
    read = [found[i] for i in range(len(found))]  # without another warning, which would be an error
    assert len(warned) == 1
    partition = int(name.parent.name)
    # After the last shard comes the first.
    following = (partition + 1) * PARTITION % 28
    for i, sample in enumerate(read):
        assert same(sample, written[following if i // PARTITION == partition else i])
    assert found.skipped == {(str(name), r): 1 for r in range(min(PARTITION, 26 - partition * PARTITION))}


def test_a_shard_that_goes_missing_while_it_is_read_is_skipped_too(copy: Path) -> None:
    (found,) = opened(copy, Task.EDIT, damaged="skip")
    following = found[LOST.stop]
    (copy / SHARD).unlink()
    with pytest.warns(UserWarning, match="is missing"):
        assert same(found[LOST.start], following)


def test_a_stream_without_any_whole_record_is_refused(copy: Path) -> None:
    for path in (copy / SHARD).parents[1].rglob("*.mds"):
        path.unlink()
    with warnings.catch_warnings(action="ignore"):
        (found,) = opened(copy, Task.EDIT, damaged="skip")
    with pytest.raises(ShardError, match="every record of the stream edit/32/32x32 is missing or damaged"):
        found[0]


# ----------------------------------------------------------------------------------------------------------- latents
LATENTS = {"vae": "0" * 64, "scaling_factor": 0.5, "channels": 3, "rows": 2, "columns": 4}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("task", [Task.T2I, Task.RECONSTRUCTION, Task.MULTI_EDIT])
def test_latents_come_as_they_were_stored(tmp_path: Path, dtype: torch.dtype, task: Task) -> None:
    latents = torch.randn(5, 1 + handmade.INPUTS[task], 3, 2, 4).to(dtype)

    def stored(record: Record, row: torch.Tensor) -> Record:
        parts = [part.contiguous().view(torch.uint8).numpy().tobytes() for part in row]
        if record.target is None:
            parts[0] = b""
        return replace(record, latents=tuple(parts))

    name = str(dtype).removeprefix("torch.")
    settings = stream(task, latents=LatentSettings(dtype=name, **LATENTS))
    handmade.write(tmp_path, {settings: [stored(r, row) for r, row in zip(shapes(task, 5), latents, strict=True)]})
    (found,) = opened(tmp_path, task)
    for i in range(5):
        wanted = latents[i][[1, 1]] if task is Task.RECONSTRUCTION else latents[i]
        assert found[i].latents.dtype == dtype
        assert torch.equal(found[i].latents, wanted)
    if task is Task.T2I:
        (again,), (nothing,) = opened(tmp_path, Task.RECONSTRUCTION), opened(tmp_path, Task.UNCONDITIONAL)
        assert torch.equal(again[1].latents, latents[1][[0, 0]])
        assert torch.equal(nothing[1].latents, latents[1])


@pytest.mark.parametrize("parts", [(), (b"\0" * 95,), (b"\0" * 96, b"\0" * 96)])
def test_latents_of_another_shape_are_refused(tmp_path: Path, parts: tuple[bytes, ...]) -> None:
    settings = stream(Task.T2I, latents=LatentSettings(dtype="float32", **LATENTS))
    record = shapes(Task.T2I, 1)[0]
    handmade.write(tmp_path, {settings: [replace(record, latents=parts)]})
    (found,) = opened(tmp_path, Task.T2I)
    with pytest.raises(ShardError, match=r"latents|unpack"):
        found[0]
