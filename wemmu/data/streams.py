"""Which streams serve which task, and which of their records are held out of training."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from wemmu.config.schema import Data
from wemmu.config.serving import SMALLEST, Need, check_readable, serving
from wemmu.config.shards import ShardError, Stream
from wemmu.config.task import Task
from wemmu.data.files import Files
from wemmu.data.mixture import Integers, window_bytes
from wemmu.data.remote import ShardCache
from wemmu.data.shards import ShardStream


def open_streams(data: Data, tasks: Iterable[Task], resolution: int) -> list[ShardStream]:
    """Open the streams of `tasks` at `resolution`, ordered by task, then by name.

    A data set without records of its own for reconstruction or unconditional generation at this resolution gives those
    of text-to-image: for reconstruction the image is input and target, for unconditional generation it is the target
    alone; the prompt is left out. They are streams with an order of their own, of samples with the same ids.

    Raises:
        ShardError: if the data set is incomplete or damaged, has no stream for one of the tasks, cannot be reached, or
            needs a larger cache.
    """
    files, streams = _data_set(data)
    leave_out = held_out_ids(data, files, streams)
    opened = _opened(data, files, streams, tasks, resolution, leave_out)
    if isinstance(files, ShardCache):
        files.check_limit(sum(window_bytes(stream.sizes, stream.shard_bytes) for stream in opened))
    return opened


def open_held_out(data: Data, tasks: Iterable[Task], resolution: int) -> list[tuple[ShardStream, Integers]]:
    """Open the streams of `tasks` at `resolution` with the places, int64 [N], of their held-out records.

    Streams that are too small to hold one out are not among them.

    Raises:
        ShardError: as `open_streams` does, or if nothing of a task is held out.
    """
    tasks = list(tasks)
    opened = [(s, spread(len(s), data.validation)) for s in _opened(data, *_data_set(data), tasks, resolution)]
    found = [(stream, places) for stream, places in opened if len(places)]
    if lacking := [task for task in tasks if all(stream.settings.task != task for stream, _ in found)]:
        raise ShardError(
            f"no record of {', '.join(lacking)} at {resolution} px is held out: data.validation is {data.validation}, "
            f"limited to a quarter of each stream, and all streams have fewer than {SMALLEST} records"
        )
    return found


def held_out_ids(data: Data, files: Files, streams: Iterable[Stream]) -> frozenset[str]:
    """Return the ids of the records that are held out of all training.

    An image has one id at all resolutions and in all tasks that it serves. So what any stream of the data set holds
    out, no other gives: no resolution and no stage trains on what another is judged by.
    """
    if not data.validation:
        return frozenset()
    opened = [ShardStream(files, s, data.damaged) for s in streams]
    return frozenset(stream.id_of(place) for stream in opened for place in spread(len(stream), data.validation))


def spread(size: int, number: int) -> Integers:
    """Return the places, int64 [N], of held-out records in a stream of `size`: evenly spaced, at most a quarter."""
    number = min(number, size // SMALLEST)
    return (2 * np.arange(number) + 1) * size // (2 * max(number, 1))


def shares(streams: Sequence[ShardStream], mixture: Mapping[Task, float]) -> list[float]:
    """Return each stream's share of its task's weight, in proportion to its number of samples."""
    totals = Counter[Task]()
    for stream in streams:
        totals[stream.settings.task] += len(stream)
    return [mixture[s.settings.task] * len(s) / totals[s.settings.task] for s in streams]


def _data_set(data: Data) -> tuple[Files, list[Stream]]:
    files = Files(data.shards)
    if data.remote is not None:
        assert data.cache_gb is not None, "the config gives both or none"
        files = ShardCache(data.remote, data.shards, data.cache_gb)
    return files, sorted(files.dataset().streams, key=lambda s: s.settings.name)


def _opened(
    data: Data,
    files: Files,
    streams: Sequence[Stream],
    tasks: Iterable[Task],
    resolution: int,
    leave_out: frozenset[str] = frozenset(),
) -> list[ShardStream]:
    opened, tasks = [], list(tasks)
    check_readable(data.remote or data.shards, streams, [Need(task, resolution) for task in tasks])
    for task in tasks:
        for s in serving(streams, task, resolution):
            opened.append(ShardStream(files, s, data.damaged, None if s.settings.task == task else task, leave_out))
    return opened
