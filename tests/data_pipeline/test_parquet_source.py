"""Parquet files of bytes, of paths and of Hugging Face's structs, whole and damaged."""

import tracemalloc
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.records import EncodedImage, Reason
from data_pipeline.sources import open_source
from tests.data_pipeline import broken
from tests.data_pipeline.reading import read_all, reasons, records
from wemmu.config import ConfigError, Task
from wemmu.config.prepare import ParquetSource


def source(path: Path | str, **options: Any) -> ParquetSource:
    return ParquetSource(kind="parquet", name="pq", path=str(path), **options)


def numbered(count: int, first: int = 0) -> pa.Table:
    numbers = range(first, first + count)
    images = [b"image %d" % n for n in numbers]
    schema = pa.schema({"image": pa.binary(), "caption": pa.string(), "other": pa.int64()})
    return pa.table([images, [f"number {n}" for n in numbers], [0] * count], schema=schema)


def test_a_record_is_a_row(tmp_path: Path) -> None:
    pq.write_table(numbered(3), tmp_path / "a.parquet")
    found = read_all(source(tmp_path / "a.parquet"))
    assert [(r.key, r.prompt, r.task) for r in found] == [(f"a.parquet/{n}", f"number {n}", Task.T2I) for n in range(3)]
    assert [r.target for r in found] == [EncodedImage(f"a.parquet/{n}:image", b"image %d" % n) for n in range(3)]


@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6), size=st.integers(1, 20))
@settings(max_examples=40, deadline=None)
def test_parts_are_whole_row_groups_and_together_everything(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], size: int
) -> None:
    path = tmp_path_factory.mktemp("groups") / "a.parquet"
    with pq.ParquetWriter(path, numbered(0).schema) as writer:
        for number, count in enumerate(sizes):
            writer.write_table(numbered(count, sum(sizes[:number])), row_group_size=100)
    found = read_all(source(path), size)
    assert [(r.key, r.prompt) for r in found] == [(f"a.parquet/{n}", f"number {n}") for n in range(sum(sizes))]
    for part in open_source(source(path)).parts(size):
        assert part.place["rows"] <= size or len(part.place["groups"]) == 1


@pytest.mark.parametrize("url", ["{root}/*.parquet", "memory://parquet-files/*.parquet"])
def test_files_are_found_on_any_filesystem(tmp_path: Path, url: str) -> None:
    url = url.format(root=tmp_path)
    for number in range(2):
        with fsspec.open(url.replace("*", str(number)), "wb") as file:
            pq.write_table(numbered(2, 2 * number), file)
    assert [r.prompt for r in read_all(source(url))] == [f"number {n}" for n in range(4)]


def test_images_are_bytes_or_paths_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (root / "in" / "1.jpg").write_bytes(b"on disk")
    out = broken.link_out_of(root)
    structs = [
        {"bytes": b"inside", "path": "nowhere.jpg"},
        {"bytes": None, "path": "in/1.jpg"},
        {"bytes": None, "path": "../outside.jpg"},
        {"bytes": None, "path": out},
        {"bytes": None, "path": "nowhere.jpg"},
        {"bytes": None, "path": None},
        None,
    ]
    pq.write_table(pa.table({"image": structs, "caption": ["x"] * 7}), tmp_path / "s.parquet")
    pq.write_table(
        pa.table({"image": [s and s["path"] for s in structs], "caption": ["x"] * 7}), tmp_path / "t.parquet"
    )
    unsafe, missing = Reason.UNSAFE_PATH, Reason.NO_IMAGE

    found = read_all(source(tmp_path / "s.parquet", root=str(root)))
    assert [(r.prompt, r.target.data) for r in records(found)] == [("x", b"inside"), ("x", b"on disk")]
    assert list(reasons(found).values()) == [unsafe, unsafe, missing, missing, missing]
    found = read_all(source(tmp_path / "t.parquet", root=str(root)))
    assert [r.target.data for r in records(found)] == [b"on disk"]
    assert list(reasons(found).values()) == [missing, unsafe, unsafe, missing, missing, missing]
    found = read_all(source(tmp_path / "s.parquet"))
    assert [r.target.data for r in records(found)] == [b"inside"]
    assert set(reasons(found).values()) == {missing}


def test_captions_are_text_or_bytes_of_text(tmp_path: Path) -> None:
    stored = [b"fine", broken.BROKEN_TEXT, None, b""]
    # Arrow does not look into what it is told to be text.
    texts = pa.array(stored, pa.binary()).view(pa.string()), pa.array(stored, pa.large_binary()).view(pa.large_string())
    for captions in (pa.array(stored, pa.binary()), *texts):
        pq.write_table(pa.table({"image": [b"x"] * 4, "caption": captions}), tmp_path / "a.parquet")
        found = read_all(source(tmp_path / "a.parquet"))
        assert [r.prompt for r in records(found)] == ["fine", None, ""]
        assert reasons(found) == {"a.parquet/1": Reason.BAD_TEXT}


def test_a_file_without_any_image_is_no_misfit(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [None, None], "caption": ["a", "b"]}), tmp_path / "a.parquet")
    assert list(reasons(read_all(source(tmp_path / "a.parquet"))).values()) == [Reason.NO_IMAGE] * 2


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([b"jpeg"], pa.dictionary(pa.int8(), pa.binary())),
        (["a.jpg"], pa.dictionary(pa.int8(), pa.string())),
        ([b"jpeg"], pa.binary(4)),
        ([b"jpeg"], pa.binary_view()),
        (["a.jpg"], pa.string_view()),
        ([{"path": "a.jpg"}], pa.struct([("path", pa.string())])),
        ([{"bytes": b"jpeg"}], pa.struct([("bytes", pa.large_binary())])),
        ([[b"jpeg"]], pa.list_(pa.binary(), 1)),
        ([["a.jpg"]], pa.list_(pa.dictionary(pa.int8(), pa.string()))),
    ],
    ids=str,
)
def test_an_image_may_have_any_type_that_arrow_has_for_it(tmp_path: Path, values: list[Any], kind: pa.DataType) -> None:
    (tmp_path / "a.jpg").write_bytes(b"jpeg")
    pq.write_table(pa.table({"image": pa.array(values, kind), "caption": ["a"]}), tmp_path / "a.parquet")
    (record,) = records(read_all(source(tmp_path / "a.parquet", root=str(tmp_path))))
    assert isinstance(record.target, EncodedImage)
    assert record.target.data == b"jpeg"


def test_a_caption_of_another_type_is_no_record(tmp_path: Path) -> None:
    for captions in [7], [[7]], [[[]]]:
        pq.write_table(pa.table({"image": [b"x"], "caption": captions}), tmp_path / "a.parquet")
        assert list(reasons(read_all(source(tmp_path / "a.parquet"))).values()) == [Reason.BAD_RECORD]


@pytest.mark.parametrize(
    ("table", "options", "message"),
    [
        ({"photo": [b"x"]}, {}, "image: .*no column image; it has photo"),
        ({"image": [b"x"], "TEXT": ["x"]}, {}, "caption: .*no column caption; it has image, TEXT.*null if there are"),
        ({"image": [1], "caption": [""]}, {}, "image: .*int64"),
        ({"image": [[[b"x"]]], "caption": [""]}, {}, "image: .*list<element: list<element: binary>>"),
        ({}, {}, "image: .*no column image; it has none"),
        ({"image": ["a.jpg"], "caption": [""]}, {}, "root: .*holds text; expected the folder"),
        ({"image": ["a.jpg"]}, {"root": "nowhere"}, "root: no directory at"),
    ],
)
def test_a_config_that_does_not_fit_the_file_is_refused(
    tmp_path: Path, table: dict[str, list], options: dict[str, str], message: str
) -> None:
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    options = {field: str(tmp_path / value) for field, value in options.items()}
    with pytest.raises(ConfigError, match=message):
        open_source(source(tmp_path / "*.parquet", **options)).parts(1)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    column = pa.array([b"x"])
    pq.write_table(pa.Table.from_arrays([column] * 3, ["image", "caption", "caption"]), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match="several columns caption"):
        open_source(source(tmp_path / "a.parquet")).parts(1)


@pytest.mark.parametrize("damage", ["empty", "cut", "text"])
def test_a_file_without_a_footer_is_one_rejection(tmp_path: Path, damage: str) -> None:
    pq.write_table(numbered(5), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "b.parquet").write_bytes({"empty": b"", "cut": whole[:-20], "text": b"<html>"}[damage])
    found = read_all(source(tmp_path / "*.parquet"))
    assert len(records(found)) == 5
    assert [(r.part, r.reason) for r in found[5:]] == [("b.parquet", Reason.BAD_CONTAINER)]


@pytest.mark.parametrize("compression", ["none", "snappy", "zstd"])
def test_a_damaged_row_group_leaves_the_others(tmp_path: Path, compression: str) -> None:
    options = {"row_group_size": 10, "compression": compression, "write_page_checksum": True, "use_dictionary": False}
    pq.write_table(numbered(30), tmp_path / "a.parquet", **options)
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 5] ^= 0xFF
    (tmp_path / "a.parquet").write_bytes(content)
    found = read_all(source(tmp_path / "a.parquet"))
    assert [r.prompt for r in records(found)] == [f"number {n}" for n in (*range(10), *range(20, 30))]
    assert list(reasons(found).values()) == [Reason.BAD_CONTAINER]


def test_a_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    images = [bytes([n]) * 2**18 for n in range(200)]
    table = pa.table({"image": pa.array(images, pa.binary())})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False, compression="none", write_batch_size=1)
    del table, images
    # What Arrow allocates, and the pieces that it asks Python's file for.
    before, opened = pa.total_allocated_bytes(), open_source(source(tmp_path / "a.parquet", caption=None))
    tracemalloc.start()
    for part in opened.parts(1000):
        for _ in opened.read(part):
            assert pa.total_allocated_bytes() - before < 25 * 2**20
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


def test_a_failing_disk_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pq.write_table(numbered(5), tmp_path / "a.parquet")
    opened = open_source(source(tmp_path / "a.parquet"))

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(pq, "ParquetFile", fail)
    with pytest.raises(OSError, match="Input/output"):
        opened.parts(1)


@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), min_size=1, max_size=6))
@settings(max_examples=100, deadline=None)
def test_damaged_pages_raise_nothing(tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]]) -> None:
    path = tmp_path_factory.mktemp("flipped") / "a.parquet"
    pq.write_table(numbered(40), path, row_group_size=10, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    # The pages only: a footer may say anything, another column's name for one.
    metadata = pq.ParquetFile(path).metadata
    pages = len(content) - metadata.serialized_size - 8
    for position, change in flips:
        content[4 + position % (pages - 4)] ^= change
    path.write_bytes(content)
    read_all(source(path))
