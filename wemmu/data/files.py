"""Where the files of a data set are: in a local directory, or in a local cache (`wemmu.data.remote`)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from wemmu.config.serving import fault_of, read_index
from wemmu.config.shards import DataSet, ShardError, Stream, written_anew


class DamageError(ShardError):
    """A record or a whole shard file is damaged; `data.damaged: skip` continues without it."""


class LostShardError(DamageError):
    """Nothing of a shard file can be read."""


class Files:
    """A data set in the directory `root` of this machine. `name` is a shard file's name inside its stream."""

    def __init__(self, root: Path):
        self._root = root

    def dataset(self) -> DataSet:
        """Raise ShardError if there is no complete data set."""
        return DataSet.at(self._root)

    def index(self, stream: Stream) -> bytes:
        """Return the stream's index; raise ShardError if its SHA-256 is not the recorded one."""
        return read_index(self._root, stream)

    def path(self, stream: Stream, name: str) -> Path:
        """Return the path of the shard file on this machine, if it is there."""
        return self._root / stream.settings.name / name

    def check(self, stream: Stream, name: str, size: int) -> None:
        """Check a shard file without reading it; raise LostShardError if the file cannot be the one of `size` bytes."""
        path = self.path(stream, name)
        if fault := fault_of(path, size):
            raise LostShardError(f"the shard file {path} is {fault}; {self.remedy(stream, name)}")

    @contextmanager
    def available(self, stream: Stream, name: str, size: int) -> Iterator[None]:
        """Keep the shard file at its path while the block runs; raises LostShardError if there is no such file."""
        try:
            yield
        except FileNotFoundError:
            self.check(stream, name, size)
            raise

    def remedy(self, stream: Stream, name: str) -> str:
        """Return what to do about a missing or damaged shard file, for messages."""
        return written_anew(self._root, stream.settings.name, name)
