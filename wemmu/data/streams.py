"""Which streams serve which task."""

from collections.abc import Iterable

from wemmu.config.schema import Data
from wemmu.config.shards import ShardError
from wemmu.config.task import FROM_T2I, Task
from wemmu.data.files import Files, LocalFiles
from wemmu.data.mixture import window_bytes
from wemmu.data.remote import ShardCache
from wemmu.data.shards import ShardStream


def open_streams(data: Data, tasks: Iterable[Task], resolution: int) -> list[ShardStream]:
    """The streams of `tasks` at `resolution`, in the order of the tasks and then of the names.

    A data set without records of its own for reconstruction or unconditional generation at this resolution gives those
    of text-to-image: for reconstruction the picture is input and target, for unconditional generation it is the target
    alone; the prompt is left out. They are streams with an order of their own, of samples with the same ids.

    Raises:
        ShardError: if the data set is incomplete or damaged, has no stream for one of the tasks, cannot be reached, or
            needs a larger cache.
    """
    cache = ShardCache(data.remote, data.shards, data.cache_gb) if data.remote is not None else None
    files: Files = cache or LocalFiles(data.shards)
    where = data.remote or data.shards
    streams = sorted(files.dataset().streams, key=lambda s: s.settings.name)
    opened = []
    for task in tasks:
        sources = (task, Task.T2I) if task in FROM_T2I else (task,)
        found = ([s for s in streams if (s.settings.task, s.settings.resolution) == (t, resolution)] for t in sources)
        own = next((streams for streams in found if streams), [])
        if not own:
            raise ShardError(
                f"the data set {where} has no stream of {' or '.join(sources)} at {resolution} px; "
                f"it has: {', '.join(s.settings.name for s in streams)}"
            )
        opened += [ShardStream(files, s, data.damaged, None if s.settings.task == task else task) for s in own]
    if cache is not None:
        cache.check_limit(sum(window_bytes(stream.sizes, stream.shard_bytes) for stream in opened))
    return opened
