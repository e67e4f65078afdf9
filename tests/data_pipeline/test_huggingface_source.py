"""Data sets that `datasets` saved: bytes pass through as they are."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict, Features, Image, List, Value

from data_pipeline.records import Reason
from data_pipeline.sources import open_source
from tests.data_pipeline import broken
from tests.data_pipeline.reading import read_all, reasons, records
from wemmu.config import ConfigError, Task
from wemmu.config.prepare import HuggingFaceSource

# The second would not survive being decoded and encoded again, the third not even being decoded.
FILES = [broken.encode(broken.photograph("chelsea")), broken.rotated_jpeg(), broken.truncated_jpeg()]


def source(path: Path | str, **options: Any) -> HuggingFaceSource:
    return HuggingFaceSource(kind="huggingface", name="hf", path=str(path), **options)


def dataset(count: int = 3) -> Dataset:
    rows = {
        "image": [{"bytes": FILES[n % 3], "path": None} for n in range(count)],
        "text": [f"number {n}" for n in range(count)],
        "label": list(range(count)),
    }
    return Dataset.from_dict(rows, Features({"image": Image(), "text": Value("string"), "label": Value("int64")}))


def test_images_pass_through_byte_by_byte(tmp_path: Path) -> None:
    dataset().save_to_disk(tmp_path / "d")
    found = read_all(source(tmp_path / "d"))
    assert [(r.key, r.prompt, r.task) for r in found] == [(str(n), f"number {n}", Task.T2I) for n in range(3)]
    assert [r.target.data for r in found] == FILES
    lists = Dataset.from_dict(
        {"image": [[{"bytes": file, "path": None}] for file in FILES], "text": ["x"] * 3},
        Features({"image": List(Image()), "text": Value("string")}),
    )
    lists.save_to_disk(tmp_path / "lists")
    assert [r.target.data for r in read_all(source(tmp_path / "lists"))] == FILES


@pytest.mark.parametrize("size", [1, 3, 4, 7, 8, 100])
def test_parts_together_are_every_row_once(tmp_path: Path, size: int) -> None:
    dataset(8).select([7, 2, 1, 0, 3, 4, 5]).save_to_disk(tmp_path / "d", num_shards=2)
    assert [r.prompt for r in read_all(source(tmp_path / "d"), size)] == [f"number {n}" for n in (7, 2, 1, 0, 3, 4, 5)]
    assert len(open_source(source(tmp_path / "d")).parts(size)) == -(-7 // size)


def test_another_data_set_has_other_parts(tmp_path: Path) -> None:
    found = []
    for count in (5, 6):
        dataset(count).save_to_disk(tmp_path / str(count))
        found.append({str(part) for part in open_source(source(tmp_path / str(count))).parts(2)})
    assert not found[0] & found[1]


def test_it_works_on_any_filesystem() -> None:
    dataset().save_to_disk("memory://hugging-face")
    assert [r.target.data for r in read_all(source("memory://hugging-face"))] == FILES


def test_a_split_is_picked(tmp_path: Path) -> None:
    DatasetDict(train=dataset(2), test=dataset(1)).save_to_disk(tmp_path / "d")
    assert len(read_all(source(tmp_path / "d", split="train"))) == 2
    for split in (None, "valid"):
        with pytest.raises(ConfigError, match=r"hf: split: .*expected one of train, test"):
            open_source(source(tmp_path / "d", split=split)).parts(1)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    dataset(1).save_to_disk(tmp_path / "d")
    for options, message in (
        ({"split": "train"}, "split: .*has no splits"),
        ({"image": "photo"}, "image: .*no column photo; it has image, text, label"),
        ({"caption": "caption"}, "caption: .*no column caption; it has image, text, label.* null if there are none"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_source(source(tmp_path / "d", **options)).parts(1)
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match=r"path: cannot load .*expected what datasets' save_to_disk wrote"):
            open_source(source(path)).parts(1)


def test_rows_without_image_or_caption(tmp_path: Path) -> None:
    rows = {"image": [None, {"bytes": b"x", "path": None}], "text": ["lost", None]}
    Dataset.from_dict(rows, Features({"image": Image(), "text": Value("string")})).save_to_disk(tmp_path / "d")
    found = read_all(source(tmp_path / "d"))
    assert reasons(found) == {"0": Reason.NO_IMAGE}
    assert [r.prompt for r in records(found)] == [None]
    assert records(read_all(source(tmp_path / "d", caption=None)))[0].prompt is None
