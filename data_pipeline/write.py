"""Writes the data set of a curriculum: what is finished stays, what is missing is written, the record comes last."""

import hashlib
import json
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from data_pipeline.partitions import Partition, finished_shards, write_partition
from data_pipeline.plan import PARTITION, plan
from wemmu.config import Curriculum
from wemmu.config.shards import (
    DATASET_FILE,
    INDEX_FILE,
    STREAM_FILE,
    DataSet,
    ShardError,
    Stream,
    StreamSettings,
    replace_text,
)

# A worker imports torch before it writes its first record, which takes as long as several partitions.
PARTITIONS_PER_WORKER = 8


def write(curriculum: Curriculum, console: Console, workers: int | None = None, partition: int = PARTITION) -> DataSet:
    """Make the data set in `curriculum.data.shards` hold every stream that the stages read.

    Streams that it already holds with equal settings are kept, others are added; nothing is ever written over. A data
    set that has them all is recognized in milliseconds, without importing ray or streaming.

    Raises:
        ConfigError: if the curriculum prepares no data for a task it trains on.
        ShardError: if the directory holds a stream with other settings, or another process is writing into it.
    """
    root, wanted = curriculum.data.shards, plan(curriculum, partition)
    for settings in wanted:
        refuse_other_settings(root, settings)
    present = _present(root)
    if {stream.settings for stream in present.streams}.issuperset(wanted):
        console.print(f"{root} is complete: {len(wanted)} streams with the settings asked for; nothing to write")
        return present
    root.mkdir(parents=True, exist_ok=True)
    with _only_writer(root):
        missing = unfinished(root, wanted)
        start, records = time.monotonic(), sum(p.samples for p in missing)
        console.print(f"{root}: {records} records in {len(missing)} partitions to write")
        if missing:
            _write_with_ray(missing, workers or _workers_for(len(missing)), console)
        dataset = finish(root, wanted)
    seconds = time.monotonic() - start
    new = [stream for stream in dataset.streams if stream.settings in wanted]
    console.print(
        f"{root} is complete: {len(dataset.streams)} streams; wrote {records} records in {seconds:.1f} s; the streams "
        f"asked for hold {sum(s.settings.samples for s in new)} records, {sum(s.bytes for s in new) / 1e6:.1f} MB"
    )
    return dataset


def refuse_other_settings(root: Path, settings: StreamSettings) -> None:
    """Raise ShardError if the stream was begun with other settings than these."""
    path = root / settings.name / STREAM_FILE
    if path.exists() and (differences := settings.differences(StreamSettings.load(path))):
        raise ShardError(
            f"the stream {settings.name} in {root} was written with other settings: now {'; '.join(differences)}. "
            f"Point data.shards to another directory, or delete {root / settings.name} and {root / DATASET_FILE} and "
            "write again"
        )


def unfinished(root: Path, wanted: tuple[StreamSettings, ...]) -> list[Partition]:
    """The partitions still to be written; what killed runs left half-written is removed."""
    missing = []
    for settings in wanted:
        directory = root / settings.name
        directory.mkdir(parents=True, exist_ok=True)
        settings.save(directory / STREAM_FILE)
        for left in directory.glob("*.tmp"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        for number in range(settings.partitions):
            partition = Partition(root, settings, number)
            if finished_shards(partition) is None:
                shutil.rmtree(partition.directory, ignore_errors=True)
                missing.append(partition)
    return missing


def _present(root: Path) -> DataSet:
    return DataSet.at(root) if (root / DATASET_FILE).exists() else DataSet(streams=())


def finish(root: Path, wanted: tuple[StreamSettings, ...]) -> DataSet:
    """Index every stream, then write the record of the data set, which keeps the streams it had."""
    kept = [stream for stream in _present(root).streams if stream.settings not in wanted]
    dataset = DataSet(streams=(*kept, *(_index(root, settings) for settings in wanted)))
    dataset.save(root / DATASET_FILE)
    return dataset


def _index(root: Path, settings: StreamSettings) -> Stream:
    """Write the index that makes one MDS data set of all partitions."""
    entries, files = [], {}
    for number in range(settings.partitions):
        partition = Partition(root, settings, number)
        shards = finished_shards(partition)
        if shards is None:
            raise ShardError(f"the partition {partition.directory} is gone or damaged; write the data set again")
        for shard in shards:
            data = shard["raw_data"]
            data["basename"] = f"{partition.directory.name}/{data['basename']}"
            files[data["basename"]] = data["hashes"]["sha256"]
            entries.append(shard)
    index = json.dumps({"version": 2, "shards": entries}, sort_keys=True)
    replace_text(root / settings.name / INDEX_FILE, index)
    files[INDEX_FILE] = hashlib.sha256(index.encode()).hexdigest()
    return Stream(settings=settings, bytes=sum(shard["raw_data"]["bytes"] for shard in entries), files=files)


@contextmanager
def _only_writer(root: Path) -> Iterator[None]:
    try:
        with FileLock(root / ".lock", timeout=0):
            yield
    except Timeout as error:
        raise ShardError(f"another process is writing into {root}; wait for it to finish") from error


def _workers_for(partitions: int) -> int:
    return max(1, min(len(os.sched_getaffinity(0)), partitions // PARTITIONS_PER_WORKER))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or 0:.0f} records/s")


def _write_with_ray(partitions: list[Partition], workers: int, console: Console) -> None:
    # Read when Ray is imported. A token of our own keeps other users of the node out of the ports that Ray opens,
    # without leaving one in the home directory; on a busy machine Ray needs longer to start than the 30 s it allows.
    os.environ |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_raylet_start_wait_time_s": "300",
    }
    import ray

    columns = (BarColumn(), MofNCompleteColumn(), _Rate(), TextColumn("left:"), TimeRemainingColumn())
    # Under /tmp whatever TMPDIR says: Ray puts sockets there, whose paths may not be longer than 107 characters.
    with tempfile.TemporaryDirectory(prefix=f"ray{os.getpid()}-", dir="/tmp", ignore_cleanup_errors=True) as scratch:
        try:
            ray.init(
                address="local",
                num_cpus=workers,
                _node_ip_address="127.0.0.1",
                include_dashboard=False,
                log_to_driver=False,
                # Only numbers travel through the store; the least Ray accepts is 75 MB.
                object_store_memory=80 * 2**20,
                _temp_dir=scratch,
            )
            remote = ray.remote(write_partition)
            running = [remote.remote(partition) for partition in partitions]
            with Progress(*columns, console=console) as progress:
                bar = progress.add_task("", total=sum(p.samples for p in partitions))
                while running:
                    done, running = ray.wait(running)
                    progress.advance(bar, sum(ray.get(done)))
        finally:
            ray.shutdown()
