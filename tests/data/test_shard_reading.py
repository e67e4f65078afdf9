"""Damage is found when a stream is opened, and the message names the file."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from wemmu.config.shards import DATASET_FILE, ShardError
from wemmu.config.task import Task
from wemmu.data.shards import open_streams

SHARD = Path("edit/32/32x32/00001/shard.00000.mds")


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.fixture
def copy(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


@pytest.mark.parametrize(
    ("damage", "words"), [(flip_a_bit, "damaged"), (truncate, "damaged"), (Path.unlink, "missing")]
)
@pytest.mark.parametrize("name", [SHARD, SHARD.parents[1] / "index.json"])
def test_damage_is_named(copy: Path, damage: Callable[[Path], None], words: str, name: Path) -> None:
    damage(copy / name)
    with pytest.raises(ShardError, match=f"{name} is {words}"):
        open_streams(copy, [Task.T2I, Task.EDIT], 32)
    open_streams(copy, [Task.T2I], 32)


def test_an_incomplete_data_set_is_refused(copy: Path) -> None:
    (copy / DATASET_FILE).unlink()
    with pytest.raises(ShardError, match="no complete data set"):
        open_streams(copy, [Task.T2I], 32)


def test_a_stream_that_is_not_there_is_named_with_those_that_are(shards: Path) -> None:
    with pytest.raises(ShardError, match=r"no stream of t2i at 64 px.*edit/32/32x32"):
        open_streams(shards, [Task.T2I], 64)


def test_streams_come_in_the_order_of_the_tasks(shards: Path) -> None:
    tasks = [Task.MULTI_EDIT, Task.EDIT, Task.T2I]
    assert [stream.settings.task for stream in open_streams(shards, tasks, 32)] == tasks
