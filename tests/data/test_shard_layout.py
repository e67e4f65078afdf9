"""The schema that writer and reader share."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wemmu.config.shards import DATASET_FILE, DataSet, ShardError, StreamSettings, pack, unpack
from wemmu.config.task import Task


def settings(**changes: object) -> StreamSettings:
    base = {"source": "shapes", "source_version": 1, "seed": 0, "task": Task.EDIT, "resolution": 64}
    sizes = {"height": 64, "width": 48, "samples": 100, "partition": 10}
    return StreamSettings(**{**base, **sizes, **changes})


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_unpack_is_the_inverse_of_pack(parts: list[bytes]) -> None:
    assert unpack(pack(parts)) == parts


@given(st.integers(1, 500), st.integers(1, 60))
def test_partitions_hold_every_record_once_and_none_is_empty(samples: int, partition: int) -> None:
    stream = settings(samples=samples, partition=partition)
    parts = [stream.records(number) for number in range(stream.partitions)]
    assert [record for part in parts for record in part] == list(range(samples))
    assert all(0 < len(part) <= partition for part in parts)


def test_the_name_says_height_before_width() -> None:
    assert settings().name == "edit/64/64x48"


def test_differences_name_the_fields_and_both_values() -> None:
    assert settings().differences(settings()) == []
    assert settings(seed=2).differences(settings(samples=7)) == ["seed: 2, not 0", "samples: 100, not 7"]


def test_a_directory_without_a_record_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"no complete data set.*data_pipeline write"):
        DataSet.at(tmp_path)


def test_another_version_of_the_layout_is_refused(tmp_path: Path) -> None:
    (tmp_path / DATASET_FILE).write_text('{"version": 99, "streams": []}')
    with pytest.raises(ShardError, match="not of this version"):
        DataSet.at(tmp_path)
