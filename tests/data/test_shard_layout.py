"""The schema that writer and reader share."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.handmade import stream
from wemmu.config.shards import COLUMNS, DATASET_FILE, DataSet, ShardError, checksum, pack, unpack
from wemmu.config.task import Task

TEXT, BYTES = st.text(max_size=5), st.binary(max_size=5)
ROWS = st.fixed_dictionaries(
    {name: TEXT if kind == "str" else BYTES for name, kind in COLUMNS.items() if name != "checksum"}
)


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_unpack_is_the_inverse_of_pack(parts: list[bytes]) -> None:
    assert unpack(pack(parts)) == parts


@given(ROWS, ROWS)
def test_other_columns_have_another_checksum(one: dict, other: dict) -> None:
    assert (checksum(one) == checksum(other)) == (one == other)


@pytest.mark.parametrize(("one", "other"), [("id", "task"), ("images", "target"), ("prompt", "answer")])
def test_what_moves_from_one_column_to_another_changes_the_checksum(one: str, other: str) -> None:
    row = {name: "ab" if kind == "str" else b"ab" for name, kind in COLUMNS.items()}
    moved = {**row, one: row[one][:1], other: row[other] + row[one][1:]}
    assert checksum(moved) != checksum(row)


def test_the_name_says_height_before_width_and_the_inputs_where_they_vary() -> None:
    assert stream(Task.EDIT, 64, 48).name == "edit/32/64x48"
    assert stream(Task.MULTI_EDIT, 64, 48, inputs=3).name == "multi_edit/32/64x48x3"


def test_a_directory_without_a_record_or_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no complete data set.*data write"):
        DataSet.at(tmp_path)
    for version in (1, 99):
        (tmp_path / DATASET_FILE).write_text(f'{{"version": {version}, "streams": []}}')
        with pytest.raises(ShardError, match="not of this version"):
            DataSet.at(tmp_path)
