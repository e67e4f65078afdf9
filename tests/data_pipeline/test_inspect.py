"""`inspect` shows what is there, complete or not, ours or not, and runs nothing that it finds."""

import io
import json
import math
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from rich.console import Console
from streaming import MDSWriter
from streaming.base.local import LocalDataset
from typer.testing import CliRunner

from data_pipeline.__main__ import app
from data_pipeline.contents import look, records
from data_pipeline.inspect import inspect
from tests.data_pipeline.worlds import photograph
from wemmu.config import Curriculum
from wemmu.config.shards import DataSet, ShardError, unpack
from wemmu.mds import Shard, read_index


def shown(root: Path, sheet_file: Path | None = None) -> str:
    console = Console(file=io.StringIO(), width=160)
    inspect(root, console, sheet_file)
    return console.file.getvalue()


# ----------------------------------------------------------------------------------------------------- reading shards
def test_records_are_read_as_streaming_reads_them(written: Curriculum) -> None:
    root = written.data.shards
    for stream in DataSet.at(root).streams:
        theirs = LocalDataset(str(root / stream.settings.name))
        ours = list(records(root, stream))
        assert len(ours) == len(theirs) == stream.samples
        for mine, columns in zip(ours, theirs, strict=True):
            assert (mine.id, mine.task, mine.prompt, mine.target) == tuple(
                columns[name] for name in ("id", "task", "prompt", "target")
            )
            assert mine.images == unpack(columns["images"])


def test_columns_of_fixed_and_of_varying_length_are_told_apart(tmp_path: Path) -> None:
    samples = [{"a": 7 * i, "b": "x" * i, "c": float(i), "d": b"\0" * i} for i in range(20)]
    with MDSWriter(
        columns={"a": "int32", "b": "str", "c": "float64", "d": "bytes"}, out=str(tmp_path), size_limit=300
    ) as out:
        for sample in samples:
            out.write(sample)
    shards = read_index(tmp_path)
    assert len(shards) > 2
    found = [record for shard in shards for record in shard.records()]
    assert [int.from_bytes(r["a"], "little") for r in found] == [s["a"] for s in samples]
    assert [(str(r["b"], "utf-8"), r["d"]) for r in found] == [(s["b"], s["d"]) for s in samples]
    assert shards[1].record(1) == list(shards[1].records())[1]


@pytest.mark.parametrize("at", [0, 3, 8, 40, -1])
def test_a_shard_that_is_cut_off_anywhere_is_refused(written: Curriculum, tmp_path: Path, at: int) -> None:
    whole = next(written.data.shards.glob("*/*/*/*/*.mds")).read_bytes()
    path = tmp_path / "shard"
    path.write_bytes(whole[:at])
    with pytest.raises(ShardError, match=r"is empty|ends within|cut off"):
        list(Shard.of_ours(path).records())


# ----------------------------------------------------------------------------------------------------------- our own
def test_it_lists_every_stream_with_an_example(written: Curriculum) -> None:
    text = shown(written.data.shards)
    assert "complete" in text
    for stream in DataSet.at(written.data.shards).streams:
        record = next(records(written.data.shards, stream))
        size = f"{stream.settings.height}x{stream.settings.width}"
        assert f"{stream.settings.name}: {record.id}" in text
        assert record.prompt in text
        assert f"target {size}" in text
    said = json.loads(CliRunner().invoke(app, ["inspect", str(written.data.shards), "--json"]).stdout)
    assert said["complete"]
    assert {s["name"]: (s["samples"], s["first"]["target"]) for s in said["streams"]} == {
        s.settings.name: (s.samples, f"{s.settings.height}x{s.settings.width}")
        for s in DataSet.at(written.data.shards).streams
    }


def test_the_contact_sheet_is_a_image_with_a_row_for_every_stream(written: Curriculum, tmp_path: Path) -> None:
    shown(written.data.shards, tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        assert sheet.height >= 160 * len(DataSet.at(written.data.shards).streams)
        assert len(sheet.getcolors(2**24)) > 1000


def test_of_an_unfinished_data_set_it_shows_what_is_finished(copied: Curriculum) -> None:
    root = copied.data.shards
    everything = sum(s.samples for s in DataSet.at(root).streams)
    (root / "dataset.json").unlink()
    assert sum(s.samples for s in look(root).streams) == everything
    (root / "ledger" / "00001.json").unlink()
    contents = look(root)
    assert not contents.complete
    assert 0 < sum(s.samples for s in contents.streams) < everything
    assert f"{contents.parts - 1} of {contents.parts} partitions are finished" in shown(root)


def test_of_a_data_set_that_was_only_begun_no_sheet_is_drawn(copied: Curriculum, tmp_path: Path) -> None:
    root = copied.data.shards
    (root / "dataset.json").unlink()
    shutil.rmtree(root / "ledger")
    with pytest.raises(ShardError, match="no finished partition yet"):
        shown(root, tmp_path / "sheet.png")


def flip_in_the_first_record(shard: Path) -> None:
    data = bytearray(shard.read_bytes())
    data[int.from_bytes(data[8:12], "little") - 1] ^= 1
    shard.write_bytes(data)


@pytest.mark.parametrize("sheet", [False, True])
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (Path.unlink, "is missing"),
        (lambda shard: shard.write_bytes(b""), "is empty"),
        (flip_in_the_first_record, "its checksum differs"),
        (lambda shard: (shard.unlink(), shard.mkdir()), "is not a file"),
    ],
)
def test_a_shard_that_cannot_be_shown_is_named_with_the_way_out(
    copied: Curriculum, tmp_path: Path, sheet: bool, damage: Callable[[Path], object], said: str
) -> None:
    shards = sorted(copied.data.shards.glob("t2i/64/64x64/*/*.mds"))
    for shard in shards:
        damage(shard)
    with pytest.raises(ShardError, match=f"{re.escape(str(shards[0]))}.*{said}.*; to write it again, delete"):
        shown(copied.data.shards, tmp_path / "sheet.png" if sheet else None)


def test_a_stream_without_records_is_told(copied: Curriculum) -> None:
    for shard in copied.data.shards.glob("t2i/64/64x64/*/*.mds"):
        shard.write_bytes(struct.pack("<2I", 0, 8))
    with pytest.raises(ShardError, match="t2i/64/64x64 holds no records, but should hold"):
        shown(copied.data.shards)


def test_a_directory_without_shards_is_refused_with_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"settings\.json.*index\.json"):
        inspect(tmp_path, Console(file=io.StringIO()))


# --------------------------------------------------------------------------------------------------------- foreign MDS
class Trap:
    """Leaves a mark when its pickle is opened."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.mark,))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    columns = {"image": "jpeg", "text": "str", "class": "int", "score": "float32", "meta": "json", "extra": "pkl"}
    out = tmp_path / "foreign"
    with MDSWriter(columns=columns, out=str(out), size_limit=200_000) as writer:
        for i in range(12):
            image = photograph("chelsea").copy()
            writer.write(
                {
                    "image": image,
                    "text": f"cat {i}",
                    "class": i,
                    "score": 0.5,
                    "meta": {"a": i},
                    "extra": Trap(tmp_path / "sprung"),
                }
            )
    return out


def test_a_foreign_data_set_shows_its_columns_and_never_opens_a_pickle(foreign: Path) -> None:
    text = shown(foreign)
    assert "12 records" in text
    for expected in ("jpeg", "an image, 300x451 px", "cat 0", "float32", "0.5", '{"a": 0}', "pkl", "not opened"):
        assert expected in text
    said = json.loads(CliRunner().invoke(app, ["inspect", str(foreign), "--json"]).stdout)
    assert (said["records"], said["columns"]["extra"], said["notes"]) == (12, "pkl", [])
    assert not (foreign.parent / "sprung").exists()
    assert "!" not in text


def test_it_tells_of_missing_shards_and_of_headers_that_differ_from_the_index(foreign: Path) -> None:
    index = json.loads((foreign / "index.json").read_text())
    index["shards"][0]["samples"] += 1
    (foreign / "index.json").write_text(json.dumps(index))
    (foreign / index["shards"][-1]["raw_data"]["basename"]).unlink()
    text = shown(foreign)
    assert "shards missing: 1" in text
    assert f"the index says {index['shards'][0]['samples']}" in text
    shutil.rmtree(foreign)
    foreign.mkdir()
    (foreign / "index.json").write_text(json.dumps(index))
    assert "not read" in shown(foreign)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"version": 1, "shards": []}', '{"version": 2, "shards": [{"format": "xsv"}]}', "\ufffd"]
)
def test_an_index_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(ShardError, match=r"index\.json"):
        shown(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"),
    [("samples", math.inf), ("column_sizes", [[]] * 6), ("raw_data", {"bytes": 1, "basename": "loop"}), ("x", None)],
)
def test_an_index_with_odd_values_is_refused(foreign: Path, field: str, value: Any) -> None:
    (foreign / "loop").symlink_to("loop")
    index = json.loads((foreign / "index.json").read_text())
    index["shards"][0][field] = value
    text = json.dumps(index) if field != "x" else "[" * 100_000
    (foreign / "index.json").write_text(text)
    with pytest.raises(ShardError, match="cannot be read as an index of MDS shards"):
        shown(foreign)


def test_a_number_of_a_wrong_length_is_shown_as_bytes(foreign: Path) -> None:
    index = json.loads((foreign / "index.json").read_text())
    kinds = index["shards"][0]["column_encodings"]
    for place, name in enumerate(index["shards"][0]["column_names"]):
        kinds[place] = "int" if name == "text" else kinds[place]
    (foreign / "index.json").write_text(json.dumps(index))
    assert "5 bytes" in shown(foreign)


def test_an_index_cannot_name_a_file_elsewhere(foreign: Path) -> None:
    index = json.loads((foreign / "index.json").read_text())
    index["shards"][0]["raw_data"]["basename"] = "../../secret"
    (foreign / "index.json").write_text(json.dumps(index))
    with pytest.raises(ShardError, match="outside"):
        shown(foreign)
